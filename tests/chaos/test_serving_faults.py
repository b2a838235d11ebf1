"""The endpoint on three hosts under a load of whole answers: which requests a fault costs, and how long it is felt."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from app.config import PromoteConfig, StoreConfig, TrackingConfig
from app.config.methods import LoraConfig
from app.data.tokenization import load_tokenizer
from app.methods import apply_method
from app.methods.delta import Delta, write_delta
from app.models.checkpoints import load_decoder, weights_hash
from app.tracking.registry import promote, register
from app.tracking.run import open_tracker, tracked_run
from tests.chaos.cluster import CACHE_REDIS_PORT, Cluster, wait_for
from tests.chaos.endpoint import Endpoint, completion
from tests.chaos.hosts import fill
from tests.chaos.traffic import Traffic

ROLLING_UPDATES = 50
AWAY_S = 20.0


@pytest.fixture(scope="module")
def registry(one_cluster: Cluster, model: Path) -> tuple[str, list[str]]:
    """Of MLflow: its URI; two versions of `served` are in it, the first of which is promoted. And their folders."""
    tracking = TrackingConfig(uri=f"sqlite:///{one_cluster.shared}/mlflow.db")
    folders = []
    for seed in (1, 2):
        output = one_cluster.shared / f"version-{seed}"
        tracker = open_tracker(tracking, output=str(output))
        with tracked_run(tracker, name="served", output=output, settings={}, resume=False, warn=pytest.fail) as run:
            random_delta(output / "delta", model, seed=seed)
            assert run is not None and run.keep(output / "delta")
            register(run.client, run.run_id, "served", delta_folder=output / "delta", figures={})
        folders.append(f"{output}/delta")
    promote(PromoteConfig(name="served", version=1, tracking=StoreConfig(uri=tracking.uri)))
    return tracking.uri, folders


def random_delta(folder: Path, base: Path, *, seed: int) -> None:
    model, method, draw = load_decoder(base), LoraConfig(rank=2), torch.Generator().manual_seed(seed)
    apply_method(model, method)
    weights = {
        name: parameter.detach() + 0.5 * torch.randn(parameter.shape, generator=draw)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    tokenizer = load_tokenizer(base).fingerprint()
    folder.mkdir(parents=True)
    metadata = {"base": str(base), "base_hash": weights_hash(base), "tokenizer_hash": tokenizer}
    write_delta(folder, Delta(method, weights, metadata))


@pytest.fixture(scope="module")
def served(one_cluster: Cluster, registry: tuple[str, list[str]], model: Path) -> Iterator[Endpoint]:
    one_cluster.mend()
    uri, (first, second) = registry
    deltas = {"live": "models:/served@production", "first": first, "second": second}
    documents = one_cluster.shared / "small/documents"
    documents.mkdir()
    with Endpoint(one_cluster, model, deltas=deltas, documents=documents, tracking=uri) as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(cluster: Cluster, served: Endpoint) -> Endpoint:
    """Whole again, after whatever the last test did."""
    served.wait_until_whole()
    return served


def goal(figures: dict) -> bool:
    return figures["lost"] == 0 and figures["seconds"] < 60


def test_a_serving_node_is_killed(cluster: Cluster, endpoint: Endpoint, record) -> None:
    host = cluster.host_at(endpoint.place("generator"))
    with Traffic(endpoint.urls, completion("pacos")) as traffic:
        traffic.go_on(5)
        host.kill()
        killed_at = time.monotonic()
        traffic.go_on(60)
    figures = traffic.figures(killed_at)
    record(
        "a worker node with a generator, an ingress and a proxy is killed while serving",
        "what it carried breaks, and is answered by another node",
        **figures, met=goal(figures),
    )  # fmt: skip
    assert figures["lost"] == 0


def test_the_head_is_killed_and_comes_back(cluster: Cluster, endpoint: Endpoint, record) -> None:
    with Traffic(endpoint.urls, completion("pacos")) as traffic:
        traffic.go_on(5)
        assert cluster.head.end_processes()
        killed_at = time.monotonic()
        traffic.go_on(AWAY_S)
        away_s = time.monotonic() - killed_at
        cluster.start_head()
        cluster.wait_for_nodes([cluster.head, *cluster.workers])
        back_s = time.monotonic() - killed_at - away_s
        traffic.go_on(5)
        whole_s = endpoint.wait_until_whole()
        traffic.go_on(5)
    figures = traffic.figures(killed_at)
    during = sum(asked.began > killed_at and asked.ended < killed_at + away_s for asked in traffic.asked)
    printed = cluster.submit("-c", "print(6 * 7)")
    assert figures["lost"] == 0 and during and "42" in printed
    record(
        "the head with its GCS is killed, Redis behind it, and started again",
        f"{during} requests are answered in {away_s:.0f} s without a head; all nodes are known again {back_s:.0f} s "
        f"after its start, all replicas {whole_s:.0f} s later, and jobs are taken",
        **figures, met=goal(figures) and back_s + whole_s < 60,
    )  # fmt: skip


def test_the_redis_of_the_cache_is_killed(cluster: Cluster, endpoint: Endpoint, record) -> None:
    def body(number: int) -> dict:
        return completion("pacos")(number % 4)  # so that most are in the cache

    with Traffic(endpoint.urls, body) as traffic:
        traffic.go_on(5)
        assert cluster.redis.end_processes(f":{CACHE_REDIS_PORT}") == 1
        killed_at = time.monotonic()
        traffic.go_on(15)
        cluster.start_redis(CACHE_REDIS_PORT)
        traffic.go_on(5)
    figures = traffic.figures(killed_at)
    asked = completion("pacos", prompt="Asked twice")(0)
    for expected in ("miss", "hit"):
        response = httpx.post(f"{endpoint.urls[0]}/v1/completions", json=asked, timeout=60)
        assert response.headers["x-pacos-cache"] == expected
    record(
        "the answer cache's Redis is killed for 15 s", "answers are computed; when it is back they are kept again",
        **figures, met=goal(figures),
    )  # fmt: skip
    assert figures["lost"] == 0


def test_fifty_rolling_updates(cluster: Cluster, endpoint: Endpoint, registry: tuple[str, list[str]], record) -> None:
    uri, _ = registry

    def text(name: str) -> str:
        asked = completion(f"pacos:{name}", prompt="An adult alpaca")(0)
        response = httpx.post(f"{endpoint.urls[0]}/v1/completions", json=asked, timeout=60)
        answer: str = response.json()["choices"][0]["text"]
        return answer

    versions = {1: text("first"), 2: text("second")}
    assert versions[1] != versions[2]
    longest_s = 0.0

    def body(number: int) -> dict:  # no token turns on so small a penalty, but the cache does not know it
        return completion("pacos:live", prompt="An adult alpaca", presence_penalty=number % 10**6 * 1e-9)(number)

    with Traffic(endpoint.urls, body) as traffic:
        traffic.go_on(2)
        for number in range(ROLLING_UPDATES):
            version = 2 - number % 2
            promote(PromoteConfig(name="served", version=version, tracking=StoreConfig(uri=uri)))
            began = time.monotonic()

            def all_new(began: float = began, expected: str = versions[version]) -> bool:
                """The last ten answers, which is more than there are clients and replicas."""
                ended = [asked for asked in list(traffic.asked) if asked.began > began][-10:]
                return len(ended) == 10 and {asked.text for asked in ended} == {expected}

            longest_s = max(longest_s, wait_for(all_new, what=f"version {version} everywhere", within_s=300))
    figures = traffic.figures(0.0) | {"seconds": longest_s}
    texts = {asked.text for asked in traffic.asked}
    assert figures["lost"] == figures["broken"] == 0 and texts == set(versions.values())
    record(
        f"{ROLLING_UPDATES} rolling updates of the served model",
        "every answer is the old version's or the new one's; seconds: the slowest update, until all replicas have it",
        **figures, met=goal(figures),
    )  # fmt: skip


@pytest.mark.usefixtures("needs_namespaces")
def test_the_disk_of_the_documents_is_full(cluster: Cluster, endpoint: Endpoint, record) -> None:
    url, filler = endpoint.urls[0], cluster.shared / "small/filler"

    def upload(number: int) -> httpx.Response:
        text = f"Document {number}. " + "An adult alpaca eats two kilograms of hay each day. " * 200
        return httpx.post(f"{url}/v1/documents", json={"name": f"{number}.txt", "text": text}, timeout=60)

    accepted = [number for number in range(5) if upload(number).is_success]
    assert len(accepted) == 5
    fill(filler)
    refused = []
    for number in range(5, 30):
        response = upload(number)
        if response.is_success:
            accepted.append(number)
        else:
            refused.append(response)
    answered = httpx.post(f"{url}/v1/rag", json={"question": "How much hay?", "max_tokens": 5}, timeout=60)
    filler.unlink()
    began = time.monotonic()
    wait_for(lambda: upload(1000).is_success, what="an upload", within_s=60)
    seconds = time.monotonic() - began
    names = set()
    for number in (*accepted, 1000):
        names.add(f"{number}.txt")
    listed = httpx.get(f"{url}/v1/documents", params={"limit": 100}, timeout=60).json()["data"]
    kept = names <= {row["name"] for row in listed}
    assert kept and refused and answered.status_code == 200
    codes = {(response.status_code, response.json()["error"]["code"]) for response in refused}
    record(
        "the disk of the documents is full",
        f"{len(refused)} of {len(refused) + len(accepted)} uploads are refused ({codes}); searches go on; what was "
        "accepted is there",
        seconds=seconds, met=kept and seconds < 60,
    )  # fmt: skip


@pytest.mark.usefixtures("needs_namespaces")
def test_a_link_is_cut_and_comes_back(cluster: Cluster, endpoint: Endpoint, record) -> None:
    host = cluster.host_at(endpoint.place("generator"))
    with Traffic(endpoint.urls, completion("pacos")) as traffic:
        traffic.go_on(5)
        host.cut()
        cut_at = time.monotonic()
        time.sleep(AWAY_S)
        host.heal()
        traffic.go_on(40)
    figures = traffic.figures(cut_at)
    stayed = host.address in cluster.nodes() and bool(host.processes("raylet/raylet"))
    record(
        f"a worker node's link is cut for {AWAY_S:.0f} s",
        "the node stays in the cluster" if stayed else "the node was given up, and is started again",
        **figures, met=goal(figures),
    )  # fmt: skip
    assert figures["lost"] == 0


@pytest.mark.usefixtures("needs_namespaces")
def test_a_slow_node(cluster: Cluster, endpoint: Endpoint, record) -> None:
    host = cluster.host_at(endpoint.place("generator"))
    with Traffic(endpoint.urls, completion("pacos")) as traffic:
        traffic.go_on(15)
        host.slow(share=0.2, rate="2mbit")
        slow_at = time.monotonic()
        traffic.go_on(40)
        usual_at = time.monotonic()
        host.usual_speed()
        traffic.go_on(15)
    before = sorted(asked.seconds for asked in traffic.asked if asked.ended < slow_at)
    while_slow = sorted(asked.seconds for asked in traffic.asked if slow_at < asked.began and asked.ended < usual_at)
    figures = traffic.figures(slow_at)
    figures["seconds"] = max(0.0, figures["seconds"] - (usual_at - slow_at))
    record(
        "a worker node with a generator has a fifth of its CPU and 2 Mbit/s, for 40 s",
        f"answers take {while_slow[len(while_slow) // 2]:.1f} s (median; before {before[len(before) // 2]:.1f} s)",
        **figures, met=goal(figures),
    )  # fmt: skip
    assert figures["lost"] == 0
