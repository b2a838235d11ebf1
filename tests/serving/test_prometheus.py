"""Debian's Prometheus over a running cluster: what the dashboard and the alerts ask for is there."""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from app.config import ServeConfig, validate
from cluster.dashboard import ROWS
from tests.serving.load import until
from tests.serving.prometheus import ALERTS, Prometheus, prometheus

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    import ray

    # Ray also links it as /tmp/ray/prom_metrics_service_discovery.json; but that is of the machine's latest cluster.
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    with prometheus(tmp_path_factory.mktemp("prometheus"), session / "prom_metrics_service_discovery.json") as server:
        yield server


@pytest.fixture(scope="module")
def ask(ray_cluster, server, model_dir, free_port, tmp_path_factory) -> Iterator[Callable[[], None]]:
    """A few requests of each kind, other ones each time."""
    from app.serving.launch import serve_application, stop_application

    config = {
        "port": free_port,
        "generator": {"model": str(model_dir), "precision": "fp32", "threads": 1, "max_batch_size": 8},
        "retriever": {"documents": str(tmp_path_factory.mktemp("documents"))},
    }
    url = serve_application(validate(ServeConfig, config))
    numbers = itertools.count()

    def run() -> None:
        body = {"model": "pacos", "prompt": f"{'hay and ' * 30} {next(numbers)}", "max_tokens": 4, "temperature": 0}
        for path, asked, status in (
            ("/v1/completions", body, 200),
            ("/v1/completions", body, 200),  # from the cache
            ("/v1/completions", body | {"model": "nobody"}, 404),
            ("/v1/rag", {"question": "How often does shearing take place?", "max_tokens": 4}, 200),
        ):
            response = client.post(path, json=asked)
            assert response.status_code == status, response.text

    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        document = {"name": "shearing.md", "text": "Shearing takes place once a year in spring."}
        assert client.post("/v1/documents", json=document).status_code == 201
        yield run
    stop_application()


@pytest.fixture(scope="module")
def told(ray_cluster: None) -> Iterator[None]:
    """What a run's and a sweep's driver tell; this process is such a driver. The run makes no step after its first."""
    from app.errors import Diverged
    from app.training.metrics import RunMetrics
    from tune.metrics import told_to_prometheus

    row = {
        "step": 1, "loss": 2.5, "eval_loss": 2.4, "learning_rate": 1e-3, "gradient_norm": 0.7, "workers": 1,
        "peak_worker_bytes": 10**9, "tokens": 512, "step_s": 0.5,
    }  # fmt: skip
    with pytest.raises(Diverged), RunMetrics("diverges"):
        raise Diverged("the loss is nan at step 3")
    with told_to_prometheus("ranks", list), RunMetrics("goes-on") as run:
        run.add(row)
        yield


def asked_now(promql: str) -> str:
    """As Grafana would ask."""
    return promql.replace("$__rate_interval", "1m").replace("$run", ".*")


def queries(*rows: str) -> dict[str, str]:
    """By row and panel."""
    return {
        f"{row}: {panel.title}: {query.legend}": asked_now(query.promql)
        for row in rows
        for panel in ROWS[row]
        for query in panel.queries
    }


def names_in(promql: str) -> set[str]:
    return set(re.findall(r"\b(?:ray|autoscaler)_\w+|\bup\b", promql))


def test_every_target_of_rays_own_list_is_scraped(server) -> None:
    def healths() -> set[str]:
        return {target["health"] for target in server.get("targets")["activeTargets"]}

    until(lambda: healths() == {"up"}, within_s=60)


def test_the_dashboards_queries_have_answers(server, ask, told) -> None:
    wanted = queries("Training", "Serving", "Answer cache", "Retrieval", "Cluster")
    wanted = {name: promql for name, promql in wanted.items() if not name.startswith("Cluster: GPU")}
    wanted |= {name: promql for name, promql in queries("Sweeps").items() if "loss" not in name}

    def without_answer() -> list[str]:
        ask()
        return [name for name, promql in wanted.items() if not any(map(math.isfinite, server.values(promql)))]

    until(lambda: not (missing := without_answer()) or print(missing), within_s=90)
    assert server.values(queries("Training")["Training: Loss: {{run}}"]) == [2.5]
    (behind,) = server.values(queries("Retrieval")["Retrieval: Changes behind: {{replica}}"])
    assert behind == 0


def test_the_alerts_ask_for_what_is_there_and_hold_their_peace(server, ask, told) -> None:
    ask()
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    asked = set().union(*(names_in(rule["expr"]) for rule in rules))

    def states() -> dict[str, str]:
        groups = server.get("rules")["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        assert {rule["health"] for rule in found} <= {"ok", "unknown"}, found
        return {rule["name"]: rule["state"] for rule in found}

    until(lambda: asked <= set(server.get("label/__name__/values")), within_s=60)
    until(lambda: states()["PacosRunDiverged"] == "firing", within_s=60)
    firing = {name for name, state in states().items() if state == "firing"}
    # the tests before this one have started many replicas on the cluster that they share
    assert firing - {"PacosReplicasRestart"} == {"PacosRunDiverged"}
