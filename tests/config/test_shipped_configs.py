from pathlib import Path

import pytest
import torch
import yaml

from app.assets import model_folder
from app.config import (
    ApplicationConfig,
    PretrainConfig,
    ServeConfig,
    SweepConfig,
    TrainConfig,
    load_config,
    validate,
)
from app.methods import apply_method
from app.models.checkpoints import empty_decoder
from tune.space import grid_of, trial_config

REPOSITORY = Path(__file__).parents[2]
SWEEPS = sorted(file.name for file in (REPOSITORY / "configs/sweeps").glob("*.yaml"))
SCHEMAS = {"pretrain-base.yaml": PretrainConfig, "quickstart.yaml": TrainConfig, "alpaca-lora.yaml": TrainConfig}


def test_every_shipped_config_is_known_here() -> None:
    assert {file.name for file in (REPOSITORY / "configs").glob("*.yaml")} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_shipped_config_loads(name: str) -> None:
    load_config(SCHEMAS[name], file=str(REPOSITORY / "configs" / name))


@pytest.mark.parametrize("name", SWEEPS)
def test_shipped_sweep_has_only_trials_that_fit_the_embedded_base(name: str) -> None:
    config = load_config(SweepConfig, file=str(REPOSITORY / "configs/sweeps" / name))
    for branch in config.space:
        for values in grid_of(branch):
            trial = trial_config(config, values)
            with torch.device("meta"):
                apply_method(empty_decoder(model_folder(trial.model)), trial.method)


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
