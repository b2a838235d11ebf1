from pathlib import Path

import pytest
import yaml

from app.errors import UserError
from app.serving.check import check_deploy_file, is_deploy_file

REPOSITORY = Path(__file__).parents[2]


def scaling(values):
    """Of the generator."""
    (found,) = [d for d in values["applications"][0]["deployments"] if d["name"] == "generator"]
    return found["autoscaling_config"]


@pytest.fixture
def values():
    return yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())


@pytest.fixture
def check(tmp_path):
    def run(values):
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump(values))
        return check_deploy_file(str(file))

    return run


def test_the_shipped_file_has_nothing_wrong():
    assert check_deploy_file(str(REPOSITORY / "serve_config.yaml")) == ["pacos"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v.update(proxy_locaton="HeadOnly"), "unknown key proxy_locaton; did you mean 'proxy_location'"),
        (lambda v: v["http_options"].update(prot=1), "unknown key http_options.prot; did you mean 'port'"),
        (lambda v: v["applications"][0].update(arg={}), "unknown key applications.0.arg; did you mean 'args'"),
        (lambda v: v["applications"][0]["args"].update(nane="x"), "application 'pacos': .*nane.*did you mean 'name'"),
        (lambda v: v["applications"][0]["args"]["generator"].update(threads=0), "generator.threads"),
        (
            lambda v: v["applications"][0]["args"]["generator"].update(kv_dtype="int8", device="cuda"),
            "int8 is for a CPU",
        ),
        (lambda v: v["applications"][0]["args"]["generator"].update(deltas={"a": "/none"}), "deltas.a='/none'"),
        (lambda v: v["applications"][0]["args"].update(access={"keys_file": "/none.yaml"}), "keys_file='/none.yaml'"),
        (lambda v: v["applications"][0]["deployments"][0].update(name="generater"), "'generater' is none of ingress"),
        (
            lambda v: scaling(v).update(max_replica=3),
            "generator.autoscaling_config.max_replica; did you mean 'max_replicas'",
        ),
        (lambda v: scaling(v).update(min_replicas=-3), "autoscaling_config.min_replicas"),
        (lambda v: scaling(v).update(policy="x"), "generator.autoscaling_config.policy='x'"),
        (lambda v: scaling(v)["policy"].update(policy_kwarg={}), r"policy.policy_kwarg; did you mean 'policy_kwargs'"),
        (lambda v: scaling(v)["policy"].update(policy_function="app.serving.autoscaling:Load"), "no attribute 'Load'"),
        (lambda v: scaling(v)["policy"].update(policy_function="no.such:thing"), "No module named 'no'"),
        (lambda v: scaling(v)["policy"]["policy_kwargs"].update(slak=0.2), "policy_kwargs.slak; did you mean 'slack'"),
        (lambda v: scaling(v)["policy"]["policy_kwargs"].update(slack=2), "policy_kwargs: slack=2 must be"),
        (
            lambda v: v["applications"][0]["deployments"].append({"name": "documents", "num_replicas": 2}),
            "documents: it is the one that writes",
        ),
        (
            lambda v: v["applications"][0]["deployments"].append({"name": "limiter", "num_replicas": 2}),
            "limiter: it counts for all",
        ),
        (lambda v: v["applications"][0]["args"].update(log={"format": "yaml"}), "log.format"),
        (lambda v: v.update(tracing_config={"enable": True}), "tracing_config.enable"),
        (lambda v: v["applications"][0].update(import_path="other:app"), "no application has import_path: app.serving"),
        (lambda v: v["http_options"].update(port="x"), "http_options.port"),
    ],
)
def test_a_mistake_is_told_by_its_place(values, check, change, told):
    change(values)
    with pytest.raises(UserError, match=told):
        check(values)


def test_settings_of_pacos_serve_are_another_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("port: 9000")
    assert not is_deploy_file(str(file)) and is_deploy_file(str(REPOSITORY / "serve_config.yaml"))
    for text, told in (("{", "not YAML"), ("[1]", "holds no settings")):
        file.write_text(text)
        with pytest.raises(UserError, match=told):
            is_deploy_file(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        is_deploy_file(str(tmp_path / "none.yaml"))
