"""The image and the compose file: linted, valid by their schemas, and as closed as they should be."""

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from changed_values import with_value
from check_jsonschema.builtin_schemas import get_builtin_schema
from packaging.specifiers import SpecifierSet
from ray_start import options, ray_starts

import app

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "cluster/docker"
DOCKERFILE = FOLDER / "Dockerfile"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

BAD = """\
FROM python:latest
RUN cd /tmp && sudo apt-get install gcc
RUN pip install ray | tee log
MAINTAINER someone
"""


# The image


def hadolint(dockerfile: str) -> set[str]:
    """The rules that it breaks."""
    command = [HADOLINT, "--no-color", "-"]
    result = subprocess.run(command, input=dockerfile, capture_output=True, text=True, timeout=60)
    assert not result.stderr, result.stderr
    return set(re.findall(r"\b(?:DL|SC)\d{4}\b", result.stdout))


def test_hadolint_has_nothing_against_the_dockerfile() -> None:
    assert hadolint(DOCKERFILE.read_text()) == set()
    assert {"DL3007", "DL3003", "DL3004", "DL3013", "DL4000", "DL4006"} <= hadolint(BAD)


def stages(dockerfile: str) -> dict[str, list[tuple[str, str]]]:
    """Each stage's instructions, after those of the stage that it is made from."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in re.sub(r"(?m)^\s*#.*\n", "", dockerfile).replace("\\\n", " ").splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found[name] = list(found.get(base, [("FROM", base)]))
        elif instruction:
            current.append((instruction, rest.strip()))
    return found


def faults(dockerfile: str, *, target: str) -> list[str]:
    """What we want of an image and hadolint does not ask for."""
    lines = stages(dockerfile)[target]
    last = {instruction: rest for instruction, rest in lines}
    found = []
    if not re.fullmatch(r"[a-z./]+:\d+\.\d+\.\d+[a-z0-9.-]*", last["FROM"]):
        found.append("the base is not pinned to a whole version")
    if not re.match(r"[1-9]\d*", last.get("USER", "0")):
        found.append("runs as root, or as a user whose number Kubernetes cannot see")
    if "HEALTHCHECK" not in last or last["HEALTHCHECK"] == "NONE":
        found.append("no health check")
    secret = re.compile(r"(TOKEN|PASSWORD|SECRET|KEY)\w*=\S")
    if any(kind in ("ENV", "ARG") and secret.search(rest) for kind, rest in lines):
        found.append("a secret in the image")
    if any(kind == "ADD" for kind, _ in lines):
        found.append("ADD fetches and unpacks; COPY does not")
    return found


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_images_are_pinned_without_root_and_checked(target: str) -> None:
    text = DOCKERFILE.read_text()
    assert faults(text, target=target) == []
    for change, fault in {
        ("python:3.11.14-slim-bookworm AS cpu", "python:3.11-slim AS cpu"): "not pinned",
        ("USER 1000:1000", "USER ray"): "root",
        ("USER 1000:1000", ""): "root",
        ("HEALTHCHECK ", "LABEL check="): "no health check",
        ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=abc"): "secret",
        ("COPY configs", "ADD configs"): "ADD",
    }.items():
        assert any(fault in found for found in faults(text.replace(*change), target=target)), change


def test_the_image_has_what_the_project_was_tested_with() -> None:
    lines = stages(DOCKERFILE.read_text())
    installs = [rest for _, rest in lines["build"] if "pip install" in rest]
    assert installs and all("--constraint constraints.txt" in install for install in installs)
    extras = set(re.search(r"'\.\[(.*?)\]'", installs[-1])[1].split(","))  # type: ignore[index]
    assert extras <= set(PROJECT["optional-dependencies"])
    assert {dict(lines[stage])["FROM"] for stage in ("build", "cpu")} == {dict(lines["gpu"])["FROM"]}
    python = re.match(r"python:(\d+\.\d+)", dict(lines["cpu"])["FROM"])[1]  # type: ignore[index]
    assert f"lib/python{python}/" in DOCKERFILE.read_text()
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)


def in_context(name: str, ignored: list[str]) -> bool:
    """Whether a file of the repository's root reaches the build; the last rule that fits it decides."""
    verdict = True
    for rule in ignored:
        if fnmatch(name, rule.removeprefix("!")):
            verdict = rule.startswith("!")
    return verdict


def test_what_is_copied_is_there_and_nothing_else_reaches_the_build() -> None:
    ignored = [line for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in "#"]
    copies = re.findall(r"(?m)^COPY (?!--from)(.+)$", DOCKERFILE.read_text())
    copied = {name for names in copies for name in names.split()[:-1]}
    assert copied and all((REPOSITORY / name).exists() and in_context(name, ignored) for name in copied)
    for name in (".env", ".git", ".venv", "runs", "secrets", "keys.yaml", "tests"):
        assert not in_context(name, ignored), name


def test_the_health_check_asks_what_answers_without_a_token() -> None:
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    check = dict(stages(DOCKERFILE.read_text())["cpu"])["HEALTHCHECK"]
    path = re.search(r"http://127\.0\.0\.1:52365(/[\w/]+)'", check)[1]  # type: ignore[index]
    assert path in PUBLIC_EXACT_PATHS and str(options([])["dashboard_agent_listen_port"]) == "52365"


# The compose file


def test_compose_is_valid_by_the_specifications_schema() -> None:
    validator = jsonschema.Draft202012Validator(get_builtin_schema("vendor.compose-spec"))
    validator.validate(COMPOSE)
    for path, value in (
        ("services.head.port", []),
        ("services.head.ports", "8265:8265"),
        ("services.worker.deploy.replicas", {"number": 2}),
        ("services.redis.healthcheck.intervall", "5s"),
        ("secrets.ray_token.enviroment", "X"),
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(with_value(COMPOSE, path, value))


def test_it_starts_head_two_workers_and_what_they_need() -> None:
    assert set(SERVICES) == {"head", "worker", "redis", "mlflow", "prometheus", "grafana"}
    assert SERVICES["worker"]["deploy"]["replicas"] == 2
    for service in SERVICES.values():
        conditions = service.get("depends_on", {})
        assert set(conditions) <= set(SERVICES)
        for name in conditions if isinstance(conditions, dict) else ():
            assert "healthcheck" in SERVICES[name] or "pacos" in SERVICES[name]["image"], f"{name} is never healthy"


def test_nodes_wait_for_a_head_that_goes_on_from_redis() -> None:
    """A GCS that loses its Redis ends, and its head starts again once Redis is back; by Ray's default nodes would end
    after a minute, and what they serve with them."""
    assert "RAY_REDIS_ADDRESS" in SERVICES["head"]["environment"]
    for name in ("head", "worker"):
        assert SERVICES[name]["environment"]["RAY_gcs_rpc_server_reconnect_timeout_s"] == "600", name
        assert SERVICES[name]["restart"] == "unless-stopped"


def open_ports(services: dict[str, Any]) -> list[str]:
    """Ports that other machines would reach."""
    published = [str(port) for service in services.values() for port in service.get("ports", ())]
    return [port for port in published if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)]


def test_ports_are_the_machines_own() -> None:
    assert open_ports(SERVICES) == []
    assert not any(service.get("network_mode") == "host" for service in SERVICES.values())
    assert open_ports({"a": {"ports": ["8265:8265", "0.0.0.0:1:1"]}, "b": {"ports": [6379, "127.0.0.1:2:2"]}}) == [
        "8265:8265",
        "0.0.0.0:1:1",
        "6379",
    ]
    assert "ports" not in SERVICES["redis"]


def is_pinned(image: str) -> bool:
    return bool(re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w.]+)?", image))


def test_images_are_pinned_and_ours_have_the_projects_version() -> None:
    assert all(is_pinned(service["image"]) for service in SERVICES.values())
    assert not any(map(is_pinned, ("redis", "redis:latest", "redis:8", "redis:8.4")))
    files = [*(REPOSITORY / "cluster").rglob("*.yaml"), DOCKERFILE, *(REPOSITORY / "docs").glob("*.md")]
    tags = {tag for file in files for tag in re.findall(r"registry\.example\.com/pacos:([\w.-]+)", file.read_text())}
    assert tags == {f"{app.__version__}-cpu", f"{app.__version__}-gpu"}


def secrets_written_down(services: dict[str, Any]) -> list[str]:
    found = []
    for name, service in services.items():
        for key, value in service.get("environment", {}).items():
            is_file = str(value).startswith("/run/secrets/")
            if re.search("TOKEN|PASSWORD|SECRET|KEY", key) and not is_file:
                found.append(f"{name}.{key}")
    return found


def test_secrets_reach_the_containers_as_files() -> None:
    assert secrets_written_down(SERVICES) == []
    assert secrets_written_down({"a": {"environment": {"GF_SECURITY_ADMIN_PASSWORD": "admin"}}})
    assert all(set(secret) == {"environment"} for secret in COMPOSE["secrets"].values())
    for name, service in SERVICES.items():
        granted = {secret["source"] for secret in service.get("secrets", ())}
        used = set(re.findall(r"/run/secrets/(\w+)", str(service)))
        assert used == granted <= set(COMPOSE["secrets"]), name
    assert '--requirepass "$$(cat /run/secrets/redis_password)"' in SERVICES["redis"]["command"][-1]


def test_no_container_can_gain_rights() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"], name
        assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service), name
        assert "mem_limit" in service and "/var/run/docker.sock" not in str(service), name


def test_nodes_start_with_flags_that_ray_has() -> None:
    head, worker = SERVICES["head"], SERVICES["worker"]
    (started,) = ray_starts(head["command"][-1].replace("$$", "$").replace("exec ", ""))
    assert started["head"] and started["block"] and (started["num_cpus"], started["num_gpus"]) == (0, 0)
    assert started["redis_password"] == "$(cat /run/secrets/redis_password)"
    assert head["environment"]["RAY_REDIS_ADDRESS"] == "redis:6379"
    joined = options(worker["command"][2:])
    assert worker["command"][:2] == ["ray", "start"] and joined["block"]
    assert joined["address"] == f"{head['hostname']}:{started['port']}"
    for service in (head, worker):
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"


def test_prometheus_asks_every_node_where_it_tells_its_metrics() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    (lookup,) = job["dns_sd_configs"]
    assert set(lookup["names"]) == {"head", "worker"} <= set(SERVICES)
    for command in (SERVICES["head"]["command"][-1], " ".join(SERVICES["worker"]["command"])):
        assert f"--metrics-export-port={lookup['port']}" in command
    grafana = yaml.safe_load((FOLDER / "grafana.yaml").read_text())
    assert grafana["datasources"][0]["url"] == "http://prometheus:9090"


def test_what_is_mounted_and_built_is_there() -> None:
    for service in SERVICES.values():
        for source in (volume.split(":")[0] for volume in service.get("volumes", ())):
            assert (FOLDER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], source
    build = SERVICES["head"]["build"]
    assert build == SERVICES["worker"]["build"]
    assert (FOLDER / build["context"]).resolve() == REPOSITORY
    assert (REPOSITORY / build["dockerfile"]).samefile(DOCKERFILE)
    assert build["target"] in stages(DOCKERFILE.read_text())


def test_what_is_served_in_containers_is_checked_as_a_deploy_file_is() -> None:
    from app.serving.check import check_deploy_file

    assert check_deploy_file(str(FOLDER / "serve_config.yaml")) == ["pacos"]
