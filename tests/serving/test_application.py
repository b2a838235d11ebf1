from pathlib import Path

import pytest
import yaml

from app.config import ApplicationConfig, validate
from app.errors import UserError
from app.serving.application import build

REPOSITORY = Path(__file__).parents[2]


def test_an_unknown_argument_stops_the_deployment():
    with pytest.raises(UserError, match="generator.max_batchsize.*did you mean 'max_batch_size'"):
        build({"generator": {"max_batchsize": 3}})


@pytest.mark.parametrize(
    "args",
    [
        {"generator": {"deltas": {"a": "runs/a/delta"}}},
        {"retriever": {"index": "runs/index"}},
        {"retriever": {"documents": "runs/documents"}},
        {"retriever": {"reranker": "./model"}},
        {"generator": {"model": "./model"}},
    ],
)
def test_a_relative_path_stops_the_deployment(args):
    with pytest.raises(UserError, match="absolute path"):
        build(args)


def test_a_delta_that_is_not_registered_stops_the_deployment(tmp_path):
    store = f"sqlite:///{tmp_path}/none.db"
    args = {"generator": {"deltas": {"a": "models:/alpaca@production"}, "tracking": {"uri": store}}}
    with pytest.raises(UserError, match="no such file; name the MLflow"):
        build(args)


def test_the_shipped_serve_config_is_valid_to_its_last_key():
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    values = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(values)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "app.serving.application:build"
    validate(ApplicationConfig, application.args)
    for deployment in application.deployments:
        assert deployment.name in {"ingress", "generator", "retriever"}
        # Serve drops unknown keys in here without a word.
        assert set(deployment.autoscaling_config) <= set(AutoscalingConfig.model_fields)
