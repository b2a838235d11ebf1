"""The endpoint on three hosts under a load of whole answers: which requests a fault costs, and how long it is felt."""

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos.cluster import CACHE_REDIS_PORT, GCS_REDIS_PORT, Cluster, wait_for
from tests.chaos.endpoint import Endpoint, completion
from tests.chaos.hosts import fill
from tests.chaos.traffic import Request, Traffic
from tests.chaos.uploads import Uploads
from tests.chaos.versions import Versions

ROLLING_UPDATES = 50
AWAY_S, REDIS_AWAY_S = 20.0, 15.0


@pytest.fixture(scope="module")
def versions(one_cluster: Cluster, model: Path) -> Versions:
    return Versions(one_cluster.shared, model)


@pytest.fixture(scope="module")
def served(one_cluster: Cluster, versions: Versions, model: Path) -> Iterator[Endpoint]:
    one_cluster.mend()
    first, second = versions.folders
    deltas = {"live": versions.served, "first": first, "second": second}
    documents = one_cluster.shared / "small/documents"
    documents.mkdir()
    with Endpoint(one_cluster, model, deltas=deltas, documents=documents, tracking=versions.uri) as endpoint:
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


def test_the_redis_of_the_gcs_is_killed(cluster: Cluster, endpoint: Endpoint, record) -> None:
    # Two clients: a head starts on the same cores, and again as long as its agents take more than 15 s for that.
    with Traffic(endpoint.urls, completion("pacos"), clients=2, pause_s=0.2) as traffic:
        traffic.go_on(5)
        assert cluster.redis.end_processes(f":{GCS_REDIS_PORT}") == 1
        killed_at = time.monotonic()
        with ThreadPoolExecutor() as supervisor:
            started = supervisor.submit(_start_the_head_when_it_ends, cluster)
            traffic.go_on(REDIS_AWAY_S - (time.monotonic() - killed_at))
            cluster.start_redis(GCS_REDIS_PORT)
            back_at = time.monotonic()
            ended_after_s = started.result() - killed_at
        cluster.wait_for_nodes([cluster.head, *cluster.workers])
        printed = cluster.submit("-c", "print(6 * 7)")
        jobs_s = time.monotonic() - back_at
        endpoint.wait_until_whole()
        whole_s = time.monotonic() - back_at
        traffic.go_on(5)
    figures = traffic.figures(killed_at)
    during = sum(asked.began > killed_at and asked.ended < back_at for asked in traffic.asked)
    assert figures["lost"] == 0 and during and "42" in printed
    record(
        f"the Redis behind the head's GCS is killed for {REDIS_AWAY_S:.0f} s",
        f"the GCS ends {ended_after_s:.0f} s after it, and its head with it, which its supervisor starts again; "
        f"{during} requests of two clients are answered meanwhile. A job has run {jobs_s:.0f} s after Redis is back, "
        f"all replicas are known after {whole_s:.0f}",
        **figures | {"seconds": max(figures["seconds"], jobs_s, whole_s)},
        met=goal(figures) and max(jobs_s, whole_s) < 60,
    )  # fmt: skip


def _start_the_head_when_it_ends(cluster: Cluster) -> float:
    """As its supervisor does, until it is healthy; the moment when it had ended."""
    wait_for(lambda: not cluster.head.processes("gcs_server"), what="the end of the GCS")
    ended_at = time.monotonic()
    cluster.start_head()
    return ended_at


def test_the_redis_of_the_cache_is_killed(cluster: Cluster, endpoint: Endpoint, record) -> None:
    def request(number: int) -> Request:
        return completion("pacos")(number % 4)  # so that most are in the cache

    with Traffic(endpoint.urls, request) as traffic:
        traffic.go_on(5)
        assert cluster.redis.end_processes(f":{CACHE_REDIS_PORT}") == 1
        killed_at = time.monotonic()
        traffic.go_on(15)
        cluster.start_redis(CACHE_REDIS_PORT)
        traffic.go_on(5)
    figures = traffic.figures(killed_at)
    asked = completion("pacos", prompt="Asked twice")(0).body
    for expected in ("miss", "hit"):
        response = httpx.post(f"{endpoint.urls[0]}/v1/completions", json=asked, timeout=60)
        assert response.headers["x-pacos-cache"] == expected
    record(
        "the answer cache's Redis is killed for 15 s", "answers are computed; when it is back they are kept again",
        **figures, met=goal(figures),
    )  # fmt: skip
    assert figures["lost"] == 0


def test_fifty_rolling_updates(endpoint: Endpoint, versions: Versions, record) -> None:
    def text(name: str) -> str:
        asked = completion(f"pacos:{name}", prompt="An adult alpaca")(0).body
        response = httpx.post(f"{endpoint.urls[0]}/v1/completions", json=asked, timeout=60)
        answer: str = response.json()["choices"][0]["text"]
        return answer

    answers = {1: text("first"), 2: text("second")}
    assert answers[1] != answers[2]
    longest_s = 0.0

    def request(number: int) -> Request:  # no token turns on so small a penalty, but the cache does not know it
        return completion("pacos:live", prompt="An adult alpaca", presence_penalty=number % 10**6 * 1e-9)(number)

    with Traffic(endpoint.urls, request) as traffic:
        traffic.go_on(2)
        for number in range(ROLLING_UPDATES):
            version = 2 - number % 2
            versions.promote(version)
            began = time.monotonic()

            def all_new(began: float = began, expected: str = answers[version]) -> bool:
                """The last ten answers, which is more than there are clients and replicas."""
                ended = [asked for asked in list(traffic.asked) if asked.began > began][-10:]
                return len(ended) == 10 and {asked.text for asked in ended} == {expected}

            longest_s = max(longest_s, wait_for(all_new, what=f"version {version} everywhere", within_s=300))
    figures = traffic.figures(0.0) | {"seconds": longest_s}
    texts = {asked.text for asked in traffic.asked}
    assert figures["lost"] == figures["broken"] == 0 and texts == set(answers.values())
    record(
        f"{ROLLING_UPDATES} rolling updates of the served model",
        "every answer is the old version's or the new one's; seconds: the slowest update, until all replicas have it",
        **figures, met=goal(figures),
    )  # fmt: skip


def test_the_writer_of_documents_is_killed(cluster: Cluster, endpoint: Endpoint, record) -> None:
    host = cluster.host_at(endpoint.place("documents"))
    url = next(url for url in endpoint.urls if host.address not in url)
    with Uploads(endpoint.urls) as uploads:
        uploads.go_on(5)
        host.kill()
        killed_at = time.monotonic()
        before = len(uploads.kept)
        seconds = wait_for(lambda: uploads.begun_since(killed_at), what="an upload that is kept", within_s=300)
        uploads.go_on(10)
    assert before and endpoint.place("documents") != host.address
    listed = _listed(url)
    found = {row["name"]: row["id"] for row in listed}
    assert len(found) == len(listed), "a name came twice"
    missing = [
        upload.name
        for upload in uploads.kept
        if upload.name not in found
        or httpx.get(f"{url}/v1/documents/{found[upload.name]}/content", timeout=60).text != upload.text
    ]
    met = sorted({str(met) for upload in uploads.kept for met in upload.met[:-1]})
    record(
        "the node of the documents' writer is killed while documents are uploaded",
        f"{before} were accepted before and {len(uploads.kept) - before} after it, all are there, each once; what was "
        f"on its way is uploaded again ({', '.join(met)}), and accepted by a writer on another node",
        requests=len(uploads.kept), broken=sum(upload.num_broken for upload in uploads.kept), lost=len(missing),
        seconds=seconds, met=not missing and seconds < 60,
    )  # fmt: skip
    assert not missing


def _listed(url: str) -> list[dict[str, Any]]:
    """All documents."""
    rows: list[dict[str, Any]] = []
    while True:
        after = {"after": rows[-1]["id"]} if rows else {}
        page = httpx.get(f"{url}/v1/documents", params={"limit": 100, **after}, timeout=60).json()
        rows += page["data"]
        if not page["has_more"]:
            return rows


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
    codes = {f"{response.status_code} {response.json()['error']['code']}" for response in refused}
    record(
        "the disk of the documents is full",
        f"{len(refused)} of {len(refused) + len(accepted)} uploads are refused ({', '.join(sorted(codes))}); searches "
        "go on; what was accepted is there",
        seconds=seconds, met=kept and seconds < 60,
    )  # fmt: skip


@pytest.mark.usefixtures("needs_namespaces")
@pytest.mark.parametrize("away_s", [10, 20])
def test_a_link_is_cut_and_comes_back(away_s: int, cluster: Cluster, endpoint: Endpoint, record) -> None:
    host = cluster.host_at(endpoint.place("generator"))
    with Traffic(endpoint.urls, completion("pacos")) as traffic:
        traffic.go_on(5)
        host.cut()
        cut_at = time.monotonic()
        time.sleep(away_s)
        host.heal()
        traffic.go_on(40)
    figures = traffic.figures(cut_at)
    stayed = host.address in cluster.nodes() and bool(host.processes("raylet/raylet"))
    record(
        f"a worker node's link is cut for {away_s} s",
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
    before = [asked.seconds for asked in traffic.asked if asked.ended < slow_at]
    while_slow = [asked.seconds for asked in traffic.asked if slow_at < asked.began and asked.ended < usual_at]
    figures = traffic.figures(slow_at)
    figures["seconds"] = max(0.0, figures["seconds"] - (usual_at - slow_at))
    record(
        "a worker node with a generator has a fifth of its CPU and 2 Mbit/s, for 40 s",
        f"answers take {_spread(while_slow)} (before {_spread(before)})",
        **figures, met=goal(figures),
    )  # fmt: skip
    assert figures["lost"] == 0


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s, one of twenty {statistics.quantiles(seconds, n=20)[-1]:.1f} s"
