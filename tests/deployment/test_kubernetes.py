"""The Kubernetes manifests: valid for Kubernetes and KubeRay, as secure, large and reachable as they should be."""

import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kuberay_schema
import kubernetes_validate
import pytest
import yaml
from changed_values import with_value
from kuberay_schema import cluster_of, groups_of, pods_of
from network_rules import Pod, reaches, reaches_address
from ray_start import options

from app.cli import cli
from app.config import SweepConfig, TrainConfig, load_config
from app.errors import UserError
from tune.space import grid_of, trial_config

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "cluster/kubernetes"
CONFIGS = {"train": TrainConfig, "sweep": SweepConfig}
KUBERNETES = ("1.33", "1.37")


@functools.cache
def documents() -> tuple[dict[str, Any], ...]:
    return tuple(doc for file in sorted(FOLDER.glob("*.yaml")) for doc in yaml.safe_load_all(file.read_text()))


def resources(kind: str = "") -> list[dict[str, Any]]:
    """All, or those whose kind begins so."""
    return [resource for resource in documents() if resource["kind"].startswith(kind)]


def of_ray() -> list[dict[str, Any]]:
    return resources("Ray")


def name_of(resource: dict[str, Any]) -> str:
    return f"{resource['kind']} {resource['metadata']['name']}"


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that comes of the manifests, with its name for messages."""
    for resource in of_ray():
        for group, pod in pods_of(resource):
            yield f"{name_of(resource)} {group}", pod
    for resource in resources("StatefulSet"):
        template = resource["spec"]["template"]
        yield name_of(resource), {"apiVersion": "v1", "kind": "Pod"} | template


every_ray_resource = pytest.mark.parametrize("resource", of_ray(), ids=name_of)


def test_the_manifests_are_those_that_we_mean_to_have() -> None:
    names = {"RayCluster pacos-cluster", "RayJob pacos-sweep", "RayJob pacos-train", "RayService pacos"}
    assert set(map(name_of, of_ray())) == names
    assert len({resource["metadata"]["name"] for resource in of_ray()}) == 4, "each has a service called NAME-head-svc"
    assert {resource["metadata"].get("namespace", "pacos") for resource in resources()} == {"pacos"}


# Schemas


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_accepts_its_own_kinds_and_every_pod(version: str) -> None:
    own = [resource for resource in resources() if not resource["kind"].startswith("Ray")]
    for resource in [*own, *(pod for _, pod in pods())]:
        kubernetes_validate.validate(resource, version, strict=True)


def test_a_pod_with_a_misspelt_field_is_refused() -> None:
    _, pod = next(pods())
    for path, value in (
        ("spec.containers.0.readinesProbe", {}),
        ("spec.containers.0.image", 3),
        ("spec.toleration", []),
    ):
        broken = with_value(pod, path, value)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, KUBERNETES[-1], strict=True)


@every_ray_resource
def test_kuberay_knows_every_field(resource: dict[str, Any]) -> None:
    kuberay_schema.check(resource)
    autoscaler = cluster_of(resource)["autoscalerOptions"]
    container = {"name": "autoscaler", "resources": autoscaler["resources"]}
    container |= {"securityContext": autoscaler["securityContext"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}}
    kubernetes_validate.validate(pod, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", "spec.headGroup", {}),
        ("RayCluster", "spec.authOptions.mode", "tokens"),
        ("RayCluster", "spec.workerGroupSpecs.0.minReplicas", "1"),
        ("RayCluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0),  # Kubernetes wants text here
        ("RayCluster", "apiVersion", "ray.io/v1alpha1"),
        ("RayJob", "spec.rayClusterConfig", {}),  # which is RayService's name for it
        ("RayJob", "spec.submissionMode", "HttpMode"),
        ("RayJob", "spec.managedBy", "us"),
        ("RayService", "spec.upgradeStrategy", {"type": "Recreate"}),  # a RayCluster's
        ("RayService", "spec.serveConfig", ""),
        ("RayService", "spec.rayClusterConfig.gcsFaultToleranceOptions.redisPasword", {}),
    ],
)
def test_a_field_that_kuberay_lacks_is_noticed(kind: str, path: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        kuberay_schema.check(with_value(resources(kind)[0], path, value))


@every_ray_resource
def test_kuberays_operator_would_refuse_none(resource: dict[str, Any]) -> None:
    assert kuberay_schema.refusals(resource) == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "refusal"),
    [
        ("RayJob", "metadata.name", "x" * 48, "name"),
        ("RayCluster", "metadata.name", "pacos.cluster", "name"),
        ("RayCluster", "spec.headGroupSpec.resources", {"CPU": "0"}, "resources twice"),
        ("RayCluster", "spec.workerGroupSpecs.0.rayStartParams.labels", "a=b", "labels as a parameter"),
        ("RayCluster", "spec.workerGroupSpecs.0.minReplicas", 9, "more nodes at least than at most"),
        ("RayCluster", "spec.workerGroupSpecs.0.suspend", True, "a suspended group"),
        (
            "RayCluster",
            "spec.headGroupSpec.template.spec.containers.0.env",
            [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}],
            "Redis in the environment",
        ),
        ("RayCluster", "spec.headGroupSpec.rayStartParams.redis-password", "x", "Redis as a parameter"),
        ("RayCluster", "metadata.annotations", {"ray.io/ft-enabled": "true"}, "Redis in an annotation"),
        (
            "RayJob",
            "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.env",
            [{"name": "RAY_enable_autoscaler_v2", "value": "1"}],
            "the autoscaler in the environment",
        ),
        ("RayService", "spec.rayClusterConfig.headGroupSpec.template.spec.restartPolicy", "Always", "restartPolicy"),
        ("RayCluster", "spec.rayVersion", "2.51.0", "a Ray without tokens"),
        ("RayCluster", "spec.authOptions.enableK8sTokenAuth", True, "Kubernetes' tokens"),
        ("RayService", "spec.rayClusterConfig.authOptions.enableK8sTokenAuth", True, "Kubernetes' tokens"),
        ("RayJob", "spec.rayClusterSpec.upgradeStrategy", {"type": "None"}, "a cluster's upgradeStrategy"),
        (
            "RayService",
            "spec.rayClusterConfig.headGroupSpec.headService",
            {"metadata": {"name": "x"}},
            "a name for the head's service",
        ),
        ("RayJob", "spec.shutdownAfterJobFinishes", False, "a cluster that stays"),
        ("RayJob", "spec.activeDeadlineSeconds", 0, "a deadline"),
    ],
)
def test_what_the_operator_refuses_is_noticed_though_the_schema_takes_it(
    kind: str, path: str, value: Any, refusal: str
) -> None:
    changed = with_value(resources(kind)[0], path, value)
    kuberay_schema.check(changed)
    (found,) = kuberay_schema.refusals(changed)
    assert found.startswith(refusal)


@every_ray_resource
def test_ray_start_has_every_parameter(resource: dict[str, Any]) -> None:
    for name, group in groups_of(resource).items():
        parsed = options([f"--{key}={value}" for key, value in group["rayStartParams"].items()])
        if name == "head":
            assert (parsed["num_cpus"], parsed["num_gpus"]) == (0, 0), "the head has no work"


@every_ray_resource
def test_ray_is_the_one_that_was_tested(resource: dict[str, Any]) -> None:
    assert f"ray=={cluster_of(resource)['rayVersion']}\n" in (REPOSITORY / "constraints.txt").read_text()


# Security


def weaknesses(pod: dict[str, Any]) -> list[str]:
    """What the Pod Security Standard `restricted` has against a pod, of what ours could have."""
    spec, found = pod["spec"], []
    shared = spec.get("securityContext", {})
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        own = container.get("securityContext", {})
        both = shared | own
        found += [] if both.get("runAsNonRoot") is True and both.get("runAsUser", 1) != 0 else ["runs as root"]
        found += [] if both.get("seccompProfile", {}).get("type") == "RuntimeDefault" else ["seccomp"]
        found += [] if own.get("allowPrivilegeEscalation") is False else ["privilege escalation"]
        found += [] if own.get("capabilities") == {"drop": ["ALL"]} else ["capabilities"]
        found += ["privileged"] if own.get("privileged") else []
    found += [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    found += ["hostPath" for volume in spec.get("volumes", ()) if "hostPath" in volume]
    return found


def test_every_pod_keeps_the_strictest_standard_that_the_namespace_demands() -> None:
    (namespace,) = resources("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {name: weaknesses(pod) for name, pod in pods() if weaknesses(pod)} == {}
    for resource in of_ray():  # the autoscaler's container stands in the head's pod
        assert cluster_of(resource)["autoscalerOptions"]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(
    ("path", "value", "weakness"),
    [
        ("spec.securityContext.runAsUser", 0, "runs as root"),
        ("spec.securityContext.seccompProfile", {"type": "Unconfined"}, "seccomp"),
        ("spec.containers.0.securityContext.allowPrivilegeEscalation", True, "privilege escalation"),
        ("spec.containers.0.securityContext.capabilities", {"drop": ["ALL"], "add": ["SYS_ADMIN"]}, "capabilities"),
        ("spec.hostNetwork", True, "hostNetwork"),
        ("spec.volumes", [{"name": "host", "hostPath": {"path": "/"}}], "hostPath"),
    ],
)
def test_a_weak_pod_is_noticed(path: str, value: Any, weakness: str) -> None:
    _, pod = next(pods())
    assert weakness in weaknesses(with_value(pod, path, value))


def test_secrets_are_named_and_nowhere_written_down() -> None:
    assert not resources("Secret")
    for name, pod in pods():
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", ()):
                is_secret = re.search("TOKEN|PASSWORD|AUTH|KEY|SECRET", variable["name"])
                assert not is_secret or "secretKeyRef" in variable["valueFrom"], (name, variable)
    for resource in of_ray():
        cluster = cluster_of(resource)
        assert cluster["authOptions"] == {"mode": "token", "secretName": "pacos-ray-token"}
        if redis := cluster.get("gcsFaultToleranceOptions"):
            assert redis["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "pacos-redis", "key": "password"}}}


def test_only_the_head_may_ask_kubernetes() -> None:
    for name, pod in pods():
        may_ask = pod["spec"].get("automountServiceAccountToken", True)
        assert may_ask == name.endswith(" head"), name  # its autoscaler starts and ends workers


# Sizes, health, what lasts


def amount(quantity: str | int) -> float:
    """A Kubernetes quantity as a number; its schema takes any text for one."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?", str(quantity))
    assert match, f"{quantity!r} is not a quantity"
    powers = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(match[1]) * powers.get(match[2], 1)


def test_every_container_asks_for_what_it_needs_and_is_held_to_it() -> None:
    limits = [(name, c["resources"]) for name, pod in pods() for c in pod["spec"]["containers"]]
    limits += [(name_of(r), cluster_of(r)["autoscalerOptions"]["resources"]) for r in of_ray()]
    for name, resource in limits:
        for kind in ("cpu", "memory"):
            assert amount(resource["requests"][kind]) <= amount(resource["limits"][kind]), name
    with pytest.raises(AssertionError, match="is not a quantity"):
        amount("8 GB")


@every_ray_resource
def test_gpu_workers_go_to_the_pool_of_gpus_and_no_others_do(resource: dict[str, Any]) -> None:
    for name, pod in pods_of(resource):
        spec, container = pod["spec"], pod["spec"]["containers"][0]
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert has_gpu == (name == "gpu")
        assert has_gpu == any(toleration["key"] == "nvidia.com/gpu" for toleration in spec.get("tolerations", ()))
        assert has_gpu == ("nvidia.com/gpu.present" in spec.get("nodeSelector", {}))
        assert container["image"].endswith("-gpu" if has_gpu else "-cpu")


@every_ray_resource
def test_probes_ask_what_answers_without_a_token(resource: dict[str, Any]) -> None:
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for name, pod in pods_of(resource):
        container = pod["spec"]["containers"][0]
        probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
        for kind, probe in probes.items():
            is_serving = resource["kind"] == "RayService" and name != "head" and kind == "readiness"
            if is_serving:  # Serve's proxy, on the port that the configuration gives it
                assert probe == {"path": "/-/healthz", "port": 8000}
            else:
                assert probe["path"] in PUBLIC_EXACT_PATHS and probe["port"] == 52365
        patience = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
        assert patience >= 300, "an image with a cold cache takes minutes"


def test_what_the_cluster_knows_lies_in_redis() -> None:
    for resource in of_ray():
        is_lasting = resource["kind"] != "RayJob"
        assert is_lasting == ("gcsFaultToleranceOptions" in cluster_of(resource))
    (service,), (redis,) = resources("Service"), resources("StatefulSet")
    host, port = cluster_of(of_ray()[0])["gcsFaultToleranceOptions"]["redisAddress"].split(":")
    assert (service["metadata"]["name"], service["spec"]["ports"][0]["port"]) == (host, int(port))
    assert service["spec"]["selector"].items() <= redis["spec"]["template"]["metadata"]["labels"].items()
    assert redis["spec"]["selector"]["matchLabels"].items() <= redis["spec"]["template"]["metadata"]["labels"].items()
    container = redis["spec"]["template"]["spec"]["containers"][0]
    claims = {claim["metadata"]["name"] for claim in redis["spec"]["volumeClaimTemplates"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= claims
    assert "--appendonly" in container["command"] and "--requirepass" in container["command"]


@every_ray_resource
def test_all_nodes_share_the_storage_that_is_claimed(resource: dict[str, Any]) -> None:
    (claim,) = resources("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for _, pod in pods_of(resource):
        names = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"]}
        mounts = {mount["mountPath"]: names[mount["name"]] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounts == {"/srv/pacos": claim["metadata"]["name"]}


# What runs


@pytest.mark.parametrize("job", resources("RayJob"), ids=name_of)
def test_a_job_is_a_command_of_ours_with_valid_settings(job: dict[str, Any]) -> None:
    config = configuration_of(job["spec"]["entrypoint"])
    assert str(config.output).startswith("/srv/pacos/"), "results on what all nodes share"


def test_a_job_with_a_misspelt_setting_is_noticed() -> None:
    entrypoint = resources("RayJob")[0]["spec"]["entrypoint"]
    with pytest.raises(UserError, match="did you mean"):
        configuration_of(f"{entrypoint} budgett.trials=3 outpt=/x")
    with pytest.raises(AssertionError, match="no command"):
        configuration_of(entrypoint.replace("pacos sweep", "pacos sweeps"))


@pytest.mark.parametrize("job", resources("RayJob"), ids=name_of)
def test_a_job_has_room_as_soon_as_its_cluster_is_up(job: dict[str, Any]) -> None:
    """`pacos` refuses a job for which the cluster has too little, it does not wait for the autoscaler."""
    config = configuration_of(job["spec"]["entrypoint"])
    if isinstance(config, SweepConfig):
        config = trial_config(config, next(grid_of(config.space[0])))
    workers = config.workers
    there = {"cpu": 0.0, "nvidia.com/gpu": 0.0}
    for name, group in groups_of(job).items():
        if name != "head":
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert group["replicas"] == group["minReplicas"] <= group["maxReplicas"]
            there = {kind: have + group["minReplicas"] * amount(limits.get(kind, 0)) for kind, have in there.items()}
    assert there["cpu"] >= workers.least * workers.cpus + 1
    assert there["nvidia.com/gpu"] >= workers.least * workers.gpus


def test_what_the_service_deploys_is_checked_as_a_deploy_file_is(tmp_path: Path) -> None:
    from app.serving.check import check_deploy_file

    (service,) = resources("RayService")
    file = tmp_path / "serve.yaml"
    file.write_text(service["spec"]["serveConfigV2"])
    assert check_deploy_file(str(file)) == ["pacos"]  # which makes the autoscaling policy, too
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    file.write_text(service["spec"]["serveConfigV2"].replace("max_replicas", "max_replica"))
    with pytest.raises(UserError, match="did you mean 'max_replicas'"):
        check_deploy_file(str(file))


def configuration_of(entrypoint: str) -> Any:
    """The settings that a `pacos` command line stands for, its files taken from the repository."""
    program, command, *arguments = shlex.split(entrypoint)
    assert program == "pacos" and command in {entry.callback.__name__ for entry in cli.registered_commands}, (
        f"no command: {entrypoint}"
    )
    assert arguments[0] == "--config"
    file = REPOSITORY / Path(arguments[1]).relative_to("/opt/pacos")
    return load_config(CONFIGS[command], file=str(file), overrides=arguments[2:])


# The network

RAY_POD = Pod({"ray.io/is-ray-node": "yes"})
REDIS_POD = Pod({"app.kubernetes.io/name": "redis"})
OPERATOR = Pod({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system")
CLIENT = Pod(namespace="web", namespace_labels={"pacos/client": "true"})
PROMETHEUS = Pod(namespace="monitoring")
STRANGER, NEIGHBOUR = Pod(namespace="web"), Pod({"app": "other"})


@pytest.mark.parametrize(
    ("source", "target", "ports"),
    [
        (RAY_POD, RAY_POD, {6379, 8000, 8080, 8265, 10001, 52365}),
        (RAY_POD, REDIS_POD, {6379}),
        (OPERATOR, RAY_POD, {8000, 8265, 52365}),
        (CLIENT, RAY_POD, {8000}),
        (PROMETHEUS, RAY_POD, {8080}),
        (STRANGER, RAY_POD, set()),
        (NEIGHBOUR, RAY_POD, set()),
        (STRANGER, REDIS_POD, set()),
        (NEIGHBOUR, REDIS_POD, set()),
        (CLIENT, REDIS_POD, set()),
        (REDIS_POD, RAY_POD, set()),
    ],
)
def test_the_network_lets_through_what_is_needed_and_nothing_else(source: Pod, target: Pod, ports: set[int]) -> None:
    policies = resources("NetworkPolicy")
    assert {port for port in (6379, 8000, 8080, 8265, 10001, 52365) if reaches(policies, source, target, port)} == ports


def test_nodes_reach_stores_outside_but_not_the_clouds_metadata() -> None:
    policies = resources("NetworkPolicy")
    assert reaches_address(policies, RAY_POD, "203.0.113.7", 443)
    assert not reaches_address(policies, RAY_POD, "203.0.113.7", 22)
    assert not reaches_address(policies, RAY_POD, "169.254.169.254", 443)
    assert not reaches_address(policies, REDIS_POD, "203.0.113.7", 443)


def test_without_the_policy_that_forbids_the_rest_pods_would_be_open() -> None:
    policies = [policy for policy in resources("NetworkPolicy") if policy["metadata"]["name"] != "nothing-else"]
    assert reaches(policies, STRANGER, NEIGHBOUR, 22)
    assert not reaches(resources("NetworkPolicy"), STRANGER, NEIGHBOUR, 22)
