"""docs/security.md names tests: each is there."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from app.config import ServeConfig
from app.serving.launch import _http_options

REPOSITORY = Path(__file__).parents[2]
NAMED = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", (REPOSITORY / "docs/security.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_a_test_that_the_threat_model_names_exists(file: str, name: str) -> None:
    assert name, f"{file}: name the test"
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_threat_model_names_tests() -> None:
    assert len(set(NAMED)) > 40


def test_an_endpoint_listens_on_localhost_unless_told_otherwise() -> None:
    assert ServeConfig().host == _http_options(ServeConfig())["host"] == "127.0.0.1"
    deployed = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text(encoding="utf-8"))
    assert deployed["http_options"]["host"] == "127.0.0.1"
    assert deployed["proxy_location"] == "HeadOnly" and "grpc_options" not in deployed
