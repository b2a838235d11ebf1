"""The application as `serve deploy` deploys it, several replicas of each deployment, under load: what is logged,
models that are promoted, replicas and servers that are killed, autoscaling."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from app.config.methods import LoraConfig
from app.serving.check import check_deploy_file
from tests.serving.load import Load, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
KEY = "key-of-ana"
HEADERS = {"authorization": f"Bearer {KEY}"}
KEY_HASH = hashlib.sha256(KEY.encode()).hexdigest()
DEPLOYMENTS = {"ingress": 2, "generator": 2, "retriever": 2, "limiter": 1}
LONG = {"model": "pacos", "prompt": "An adult alpaca", "max_tokens": 200, "temperature": 1.0}
KINDS = {
    "whole": ("/v1/completions", LONG),
    "stream": ("/v1/completions", LONG | {"stream": True}),
    "cached": ("/v1/completions", LONG | {"temperature": 0.0, "max_tokens": 20}),
    "rag": ("/v1/rag", lambda number: {"question": f"How often does shearing take place? {number}", "max_tokens": 10}),
}


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not on PATH")
    folder = tmp_path_factory.mktemp("redis")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    yield server, f"redis://127.0.0.1:{port}/0"
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def versions(make_delta):
    return [make_delta(f"version-{number}", LoraConfig(rank=2), seed=number) for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def deploy_file(model_dir, index_dir, versions, registry, redis, tracking_store, free_port):
    """The shipped one, with these tests' models and times."""
    registry("operated", versions[0])
    values = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())
    values["http_options"]["port"] = free_port
    (application,) = values["applications"]
    application["args"] |= {
        "generator": {
            "model": str(model_dir), "precision": "fp32", "threads": 1, "max_batch_size": 8, "max_queue": 256,
            "refresh_s": 0.2,
            "deltas": {"live": "models:/operated@production", "old": str(versions[0]), "new": str(versions[1])},
            "tracking": {"uri": tracking_store},
        },
        "retriever": {"index": str(index_dir), "top_k": 2},
        "cache": {"backend": {"type": "redis", "url": redis[1]}},
        "access": {"keys": [{"name": "ana", "sha256": KEY_HASH}]},
        "log": {"format": "json"},
    }  # fmt: skip
    for deployment in application["deployments"]:
        least = DEPLOYMENTS[deployment["name"]]
        most = 3 if deployment["name"] == "generator" else least
        deployment["autoscaling_config"] |= {
            "min_replicas": least, "max_replicas": most, "metrics_interval_s": 1, "look_back_period_s": 2,
            "upscale_delay_s": 1, "downscale_delay_s": 5,
            "target_ongoing_requests": 10_000,  # by Serve's own policy there would never be another
        }  # fmt: skip
    return values


def deploy(values, tmp_path_factory):
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    file = tmp_path_factory.mktemp("deploy") / "serve.yaml"
    file.write_text(yaml.safe_dump(values))
    assert check_deploy_file(str(file)) == ["pacos"]
    _get_global_client().deploy_apps(ServeDeploySchema(**values))


@pytest.fixture(scope="module")
def url(ray_cluster, deploy_file, tmp_path_factory):
    from ray import serve

    from app.serving.launch import _wait_until_healthy, _wait_until_running, stop_application

    http_options = deploy_file["http_options"]
    serve.start(proxy_location="HeadOnly", http_options=http_options)
    try:
        deploy(deploy_file, tmp_path_factory)
        until(lambda: "pacos" in serve.status().applications)
        _wait_until_running(lambda states: None, 300)
        url = f"http://127.0.0.1:{http_options['port']}"
        _wait_until_healthy(url, 60)
        yield url
    finally:
        stop_application()


def replicas(deployment):
    """The running ones' ids, and their processes'."""
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()["applications"]["pacos"]["deployments"][deployment]
    return {replica["replica_id"]: replica["pid"] for replica in details["replicas"] if replica["state"] == "RUNNING"}


def logged(pattern, **fields):
    """The lines with such fields in the replicas' logs, of deployments whose file matches."""
    import ray

    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    found = []
    for file in folder.glob(pattern):
        for line in file.read_text(errors="replace").splitlines():
            values = json.loads(line) if line.startswith("{") else {}
            if fields.items() <= values.items():
                found.append(values)
    return found


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=60, trust_env=False, headers=HEADERS) as client:
        yield client


def test_a_request_is_found_by_its_id_in_the_log_and_nowhere_its_words(client):
    body = {"model": "pacos", "prompt": "quixotically said", "max_tokens": 7, "temperature": 0}
    headers = {"x-request-id": "asked-by-the-test"}
    response = client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200 and response.headers["x-request-id"] == "asked-by-the-test"
    until(lambda: logged("replica_pacos_ingress*", request_id="asked-by-the-test", path="/v1/completions"))
    (line,) = logged("replica_pacos_ingress*", request_id="asked-by-the-test", path="/v1/completions")
    usage = response.json()["usage"]
    expected = {
        "method": "POST", "status": 200, "model": "pacos", "cache": "miss", "key": KEY_HASH[:12], "error": None,
        "prompt_tokens": usage["prompt_tokens"], "completion_tokens": 7, "application": "pacos",
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected
    assert line["latency_ms"] >= line["first_byte_ms"] > 0
    generated = logged("replica_pacos_generator*", request_id="asked-by-the-test")
    assert generated, "the same id in every deployment that worked on it"
    import ray

    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    texts = [file.read_text(errors="replace") for file in folder.glob("*.log")]
    assert texts and not any("quixotically" in text or KEY in text for text in texts)


def test_a_promoted_delta_answers_from_every_replica_and_no_request_fails(
    url, client, registry, versions, damage, tracking_store, monkeypatch
):
    from ray import serve

    from app.config import PromoteConfig, StoreConfig
    from app.tracking.registry import promote

    def text(name):
        body = {"model": f"pacos:{name}", "prompt": "An adult alpaca", "max_tokens": 12, "temperature": 0}
        return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    def hashes(name):
        infos = serve.get_deployment_handle("generator", "pacos").broadcast("models").results(timeout_s=60)
        return [info.hash for replica in infos for info in replica if info.name == f"pacos:{name}"]

    old, new = text("old"), text("new")
    asked = {"model": "pacos:live", "prompt": "An adult alpaca", "max_tokens": 12, "temperature": 0}
    # no token turns on so small a penalty, but the cache does not know it
    kinds = {
        "whole": ("/v1/completions", lambda number: asked | {"presence_penalty": number % 10**6 * 1e-9}),
        "stream": (
            "/v1/completions",
            lambda number: asked | {"presence_penalty": number % 10**6 * 1e-9, "stream": True},
        ),
    }
    with Load(url, kinds, headers=HEADERS) as load:
        load.go_on(0.5)
        good = registry("operated", versions[1])
        until(lambda: hashes("live") == hashes("new"))
        changed_at = time.monotonic()
        load.go_on(1)
        broken = registry("operated", versions[2], promoted=False)
        damage(versions[2])
        monkeypatch.setattr("app.tracking.registry.fetch", lambda reference, uri: None)  # which would refuse it
        promote(PromoteConfig(name="operated", version=broken, tracking=StoreConfig(uri=tracking_store)))
        until(lambda: len({line["replica"] for line in _refusals(good)}) == 2)
        load.go_on(1)
    assert len(hashes("live")) == 2 and hashes("live") == hashes("new")
    promote(PromoteConfig(name="operated", version=good, tracking=StoreConfig(uri=tracking_store)))  # for those after
    assert all(outcome.is_complete for outcome in load.outcomes)
    texts = {outcome.text for outcome in load.outcomes}
    assert texts == {old, new}
    assert {outcome.text for outcome in load.outcomes if outcome.began > changed_at} == {new}


def _refusals(good):
    """What replicas said of a version that they cannot load, in whose place they keep `good`."""
    lines = logged("replica_pacos_generator*", levelname="ERROR")
    return [line for line in lines if line["message"].startswith(f"pacos:live stays models:/operated/{good}: ")]


def failed(load):
    return [outcome for outcome in load.outcomes if not outcome.is_complete]


@pytest.mark.chaos
def test_a_replica_that_dies_takes_along_only_what_it_had_begun_to_answer(url):
    before = {name: replicas(name) for name in ("generator", "retriever", "ingress")}
    killed_at = {}
    with Load(url, KINDS, headers=HEADERS) as load:
        load.go_on(1)
        for name, running in before.items():
            os.kill(next(iter(running.values())), signal.SIGKILL)
            killed_at[name] = time.monotonic()
            load.go_on(2)
        for name, running in before.items():
            until(lambda name=name, running=running: len(set(replicas(name)) - set(running)) == 1)
        load.go_on(1)
    lost = [outcome for outcome in failed(load) if not _went_with_ingress(outcome, killed_at["ingress"])]
    for outcome in lost:  # in the generator, all else was done again by the other one
        assert outcome.kind == "stream" and outcome.spans(killed_at["generator"]) and outcome.num_pieces, outcome
        assert outcome.status == 200 and outcome.error == "unavailable", outcome
    for name in ("generator", "retriever"):
        saved = {outcome.kind for outcome in load.outcomes if outcome.spans(killed_at[name]) and outcome.is_complete}
        assert {"whole", "rag"} <= saved, "some were under way"


def _went_with_ingress(outcome, killed_at):
    """With 500 by Serve's proxy, which clients ask again after, or a stream that ends before its [DONE]."""
    was_there = outcome.began < killed_at + 1 and outcome.ended > killed_at  # the proxy notices a moment later
    return was_there and (outcome.status == 500 or (outcome.kind == "stream" and outcome.status == 200))


def test_a_redis_that_dies_is_a_cache_that_misses(url, redis):
    server, _ = redis
    with Load(url, KINDS, headers=HEADERS) as load:
        load.go_on(1)
        server.kill()
        server.wait()
        load.go_on(3)
    assert not failed(load)


@pytest.mark.chaos
def test_a_crowd_gets_another_generator(url):
    crowd = {"stream": ("/v1/completions", LONG | {"stream": True, "max_tokens": 150})}
    with Load(url, crowd, clients=40, headers=HEADERS) as load:
        until(lambda: len(replicas("generator")) == 3)
    assert not failed(load)
    with Load(url, {"stream": KINDS["stream"]}, headers=HEADERS) as load:
        until(lambda: len(replicas("generator")) == 2, within_s=180)
        load.go_on(2)
    assert not failed(load), "the replica that went has finished what it had"
