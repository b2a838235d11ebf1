"""The main job on a head and three workers that share a folder and nothing else: `ray job submit`, `serve deploy`."""

import json
from pathlib import Path

import httpx

from tests.chaos.cluster import Cluster
from tests.chaos.endpoint import Endpoint


def test_prepare_train_on_three_nodes_sweep_and_serve(cluster: Cluster, data: Path, model: Path) -> None:
    assert (data / "manifest.json").exists(), "prepared by the job of the fixture"
    run, sweep = cluster.shared / "main/run", cluster.shared / "main/sweep"
    printed = cluster.submit(
        "jobs/train.py", f"data={data}", f"model={model}", f"output={run}", "max_steps=6", "batch_size=12",
        "method.rank=4", "optimizer.learning_rate=0.01", "workers.count=3", "workers.cpus=2", "workers.threads=1",
    )  # fmt: skip
    assert "held-out perplexity" in printed
    places = cluster.places_of("RayTrainWorker", alive=False)
    assert set(places) == {worker.address for worker in cluster.workers}, "one training worker a host"
    printed = cluster.submit(
        "-m", "tune.sweep", f"output={sweep}", f"train.data={data}", f"train.model={model}", "train.max_steps=4",
        "train.eval_every=2", "train.batch_size=8", "train.workers.cpus=2", "space.method.type=[lora,bitfit]",
        "search.type=grid", "scheduler.type=none", "finals.trials=0",
    )  # fmt: skip
    assert "2 finished, 0 stopped, 0 failed" in printed
    best = json.loads((sweep / "best.json").read_text())["run"]
    with Endpoint(cluster, model, deltas={"trained": f"{run}/delta", "best": f"{best}/delta"}) as endpoint:
        for url in endpoint.urls:
            for name in ("pacos", "pacos:trained", "pacos:best"):
                body = {"model": name, "prompt": "An adult alpaca", "max_tokens": 8, "temperature": 0}
                response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
                assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] > 0, response.text
        assert {endpoint.place(name) for name in ("ingress", "generator")} <= set(endpoint.addresses)
