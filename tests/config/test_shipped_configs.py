from pathlib import Path

import pytest
import yaml

from app.config import ApplicationConfig, PretrainConfig, ServeConfig, TrainConfig, load_config, validate

REPOSITORY = Path(__file__).parents[2]
SCHEMAS = {"pretrain-base.yaml": PretrainConfig, "quickstart.yaml": TrainConfig, "alpaca-lora.yaml": TrainConfig}


def test_every_shipped_config_is_known_here() -> None:
    assert {file.name for file in (REPOSITORY / "configs").glob("*.yaml")} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_shipped_config_loads(name: str) -> None:
    load_config(SCHEMAS[name], file=str(REPOSITORY / "configs" / name))


def test_serve_config_args_are_valid() -> None:
    application = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())["applications"][0]
    assert application["import_path"] == "app.serving.application:build"
    validate(ApplicationConfig, application["args"])


def test_serving_listens_on_localhost_by_default() -> None:
    assert ServeConfig().host == "127.0.0.1"
    assert yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())["http_options"]["host"] == "127.0.0.1"


def test_the_configuration_reference_is_up_to_date() -> None:
    from app.config.reference import render

    assert (REPOSITORY / "docs/configuration.md").read_text() == render(), (
        "run: python -m app.config.reference > docs/configuration.md"
    )
