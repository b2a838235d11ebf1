"""The files for `ray up`: what Ray checks before it asks a cloud for anything, and what we want of them."""

import copy
import re
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from changed_values import with_value
from ray.autoscaler._private.util import prepare_config, validate_config
from ray_start import ray_starts

REPOSITORY = Path(__file__).parents[2]
FILES = ("aws.yaml", "gcp.yaml", "on-premise.yaml")
CLOUDS = ("aws.yaml", "gcp.yaml")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "cluster" / name).read_text())


def check(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does with a file before it calls the cloud."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    check(read(name))


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("max_worker", 3, jsonschema.ValidationError),
        ("idle_timeout_minutes", "ten", jsonschema.ValidationError),
        ("docker.imag", "pacos", jsonschema.ValidationError),
        ("available_node_types.cpu.min_worker", 1, jsonschema.ValidationError),
        ("available_node_types.gpu.resources", {"GPU": "one"}, jsonschema.ValidationError),
        ("head_node_type", "heads", ValueError),
        ("max_workers", 0, ValueError),  # fewer than the groups have at least
        ("docker.container_name", "", AssertionError),
    ],
)
def test_ray_refuses_a_file_with_a_mistake(path: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        check(with_value(read("aws.yaml"), path, value))


def test_an_on_premise_file_without_its_head_is_refused() -> None:
    config = read("on-premise.yaml")
    assert check(config)["max_workers"] == len(config["provider"]["worker_ips"])
    del config["provider"]["head_ip"]
    with pytest.raises(click.ClickException):
        check(config)


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_installed_that_ray_would_choose(name: str) -> None:
    """Ray fills in what a file leaves out, among it commands that install a nightly build of itself."""
    prepared = check(read(name))
    commands = " ".join(command for key in prepared if key.endswith("_commands") for command in prepared[key])
    assert "pip install -U" not in commands and ".whl" not in commands
    del (without := read(name))["setup_commands"]
    if name in CLOUDS:
        assert any(".whl" in command for command in check(without)["setup_commands"])


@pytest.mark.parametrize("name", FILES)
def test_the_head_has_no_work_and_its_dashboard_is_on_localhost(name: str) -> None:
    config = read(name)
    (head,) = ray_starts(" && ".join(config["head_start_ray_commands"]))
    assert head["head"] and (head["num_cpus"], head["num_gpus"]) == (0, 0)
    assert head["dashboard_host"] == "127.0.0.1"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    (worker,) = ray_starts(" && ".join(config["worker_start_ray_commands"]))
    assert not worker["head"] and worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert worker["metrics_export_port"] == head["metrics_export_port"] == 8080
    if name in CLOUDS:
        assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}


def test_a_flag_that_ray_start_lacks_is_noticed() -> None:
    assert ray_starts("ulimit -n 9; ray start --head --num-cpus=2; echo")[0]["num_cpus"] == 2
    with pytest.raises(click.NoSuchOption):
        ray_starts("ray stop && ray start --head --dashboard-hosts=127.0.0.1")
    with pytest.raises(click.BadParameter):
        ray_starts("ray start --num-cpus=many")
    with pytest.raises(click.UsageError, match="of a head alone"):
        ray_starts("ray start --address=head:6379 --port=6379")


@pytest.mark.parametrize("name", FILES)
def test_every_node_wants_the_token_that_it_is_given(name: str) -> None:
    config = read(name)
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert not re.search(r"RAY_AUTH_TOKEN\b|[0-9a-f]{32}", (REPOSITORY / "cluster" / name).read_text())


def test_all_start_their_nodes_alike() -> None:
    files = [read(name) for name in FILES]
    for key in ("head_start_ray_commands", "worker_start_ray_commands", "file_mounts", "setup_commands"):
        assert files[0][key] == files[1][key] == files[2][key], key
    options = [file["docker"]["run_options"] for file in files]
    assert options[0] == options[1] == options[2]


@pytest.mark.parametrize("name", CLOUDS)
def test_cpu_and_gpu_workers_scale_on_spot_machines(name: str) -> None:
    config = check(read(name))
    groups = {key: group for key, group in config["available_node_types"].items() if key != config["head_node_type"]}
    assert set(groups) == {"cpu", "gpu"}
    for group in groups.values():
        assert group["min_workers"] < group["max_workers"] <= config["max_workers"]
        node = group["node_config"]
        is_spot = {"aws": node.get("InstanceMarketOptions") == {"MarketType": "spot"}}
        is_spot["gcp"] = node.get("scheduling", {}).get("provisioningModel") == "SPOT"
        assert is_spot[config["provider"]["type"]]
    assert groups["gpu"]["docker"]["worker_image"].endswith("-gpu")
    assert config["docker"]["image"].endswith("-cpu")


def ec2_mistakes(node: dict[str, Any]) -> str:
    """What AWS' own description of RunInstances has against a `node_config`."""
    import botocore.session
    from botocore.validate import ParamValidator

    operation = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    return ParamValidator().validate(node | {"MinCount": 1, "MaxCount": 1}, operation.input_shape).generate_report()


def test_aws_knows_every_setting_of_its_machines() -> None:
    nodes = [group["node_config"] for group in read("aws.yaml")["available_node_types"].values()]
    assert [ec2_mistakes(node) for node in nodes] == ["", "", ""]
    assert "InstanceTypes" in ec2_mistakes(nodes[0] | {"InstanceTypes": "m7i.large"})
    assert "MarketType" in ec2_mistakes(nodes[1] | {"InstanceMarketOptions": {"MarketType": 1}})


# Of Compute Engine's `instances.insert`, what our machines use.
GCP_DISK = {
    "type": "object",
    "additionalProperties": False,
    "required": ["boot", "autoDelete", "type", "initializeParams"],
    "properties": {
        "boot": {"const": True},
        "autoDelete": {"const": True},
        "type": {"enum": ["PERSISTENT", "SCRATCH"]},
        "initializeParams": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "diskSizeGb": {"type": "integer", "minimum": 50},
                "sourceImage": {"type": "string", "pattern": "^projects/[^/]+/global/images/(family/)?[^/]+$"},
            },
        },
    },
}
GCP_NODE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["machineType", "disks"],
    "properties": {
        "machineType": {"type": "string", "pattern": "^[a-z]+[0-9]+[a-z]*-[a-z]+-[0-9]+$"},
        "disks": {"type": "array", "items": GCP_DISK, "minItems": 1},
        "scheduling": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "provisioningModel": {"enum": ["STANDARD", "SPOT"]},
                "instanceTerminationAction": {"enum": ["STOP", "DELETE"]},
                "onHostMaintenance": {"enum": ["MIGRATE", "TERMINATE"]},
            },
        },
    },
}


def test_gcp_machines_are_described_as_its_api_has_them() -> None:
    config = read("gcp.yaml")
    for name, group in config["available_node_types"].items():
        jsonschema.validate(group["node_config"], GCP_NODE)
        if name != config["head_node_type"]:  # Ray does not ask GCP what a machine has
            assert group["resources"]["CPU"] == int(group["node_config"]["machineType"].rsplit("-", 1)[1])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(group["node_config"] | {"scheduling": {"provisioningModel": "CHEAP"}}, GCP_NODE)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(group["node_config"] | {"machine_type": "n2-standard-4"}, GCP_NODE)
