"""Clusters of a node or two: one is lost while a run is on it; one comes; one does not share the run's folder; and a
run that is killed.

In processes of their own: the session's process has another cluster.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from app.config import TrainConfig, load_config
from app.errors import Interrupted, UserError
from app.ray_cluster import connected
from app.training.fine_tuning import fine_tune, plan_job

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

REPOSITORY = Path(__file__).parent.parent.parent
STEPS, SAVE_EVERY, LOST_AFTER = 80, 10, 25
SAVE_SELDOM = 50
"""So that some steps are computed again where nothing else goes wrong."""
ENDLESS = ("workers.count=[1,2]", "max_steps=20000", "epochs=20000", "optimizer.warmup_fraction=0")


def in_a_process(function: str, *args: object) -> str:
    """What the function of this file prints, on a cluster of its own."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # short, for the sockets in it
        result = subprocess.run(
            [sys.executable, __file__, function, *map(str, args)],
            env={**environment, "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_run_goes_on_without_a_node_that_was_lost(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    in_a_process("lose_a_node", small_data, tiny_model, tmp_path / "run", tmp_path / "seen.jsonl")
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in seen]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    again = [step for step in set(steps) if steps.count(step) > 1]
    assert len(again) <= SAVE_EVERY, "what it costs is at most the steps since the last checkpoint"
    for step in again:
        first, *others = [row["loss"] for row in seen if row["step"] == step]
        assert others == pytest.approx([first] * len(others), abs=1e-4), "one worker computes what two did"
    states = [json.loads(file.read_text()) for file in sorted((tmp_path / "run/checkpoints").glob("*/state.json"))]
    workers = [state["workers"] for state in states]
    assert len(workers) == STEPS // SAVE_EVERY and workers == sorted(workers, reverse=True)
    assert workers[:2] == [2, 2] and workers[-1] == 1


def test_a_run_takes_in_a_node_that_comes(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    in_a_process("gain_a_node", small_data, tiny_model, tmp_path / "run", tmp_path / "seen.jsonl")
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in seen]
    assert sorted(set(steps)) == list(range(1, max(steps) + 1))
    again = [step for step in set(steps) if steps.count(step) > 1]
    print(f"{len(again)} of {max(steps)} steps were computed again")
    assert len(again) <= SAVE_SELDOM, "what it costs is at most the steps since the last checkpoint"
    for step in again:
        first, *others = [row["loss"] for row in seen if row["step"] == step]
        assert others == pytest.approx([first] * len(others), abs=1e-4), "two workers compute what one did"
    workers = [row["workers"] for row in seen]
    assert workers == sorted(workers) and set(workers) == {1, 2}


def test_a_killed_elastic_run_goes_on_without_waiting_for_its_own_room(
    small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Ray keeps that room for three minutes."""
    in_a_process("resume_a_killed_run", small_data, tiny_model, tmp_path / "run", tmp_path / "seconds")
    assert float((tmp_path / "seconds").read_text()) < 100


def test_a_node_that_does_not_share_the_runs_folder_is_told_at_the_start(
    small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this process may not mount a file system of its own")
    (tmp_path / "runs").mkdir()
    printed = in_a_process("share_no_storage", small_data, tiny_model, tmp_path / "runs/run")
    assert "does not see the run in output=" in printed and "storage that all nodes share" in printed
    assert not (tmp_path / "runs/run/checkpoints").exists()


def plan(data: str, model: str, output: str, *overrides: str) -> Any:
    settings = [
        f"data={data}", f"model={model}", f"output={output}", f"max_steps={STEPS}", "epochs=8", "batch_size=8",
        f"save_every={SAVE_EVERY}", "keep_last=9", "eval_every=80", "precision=fp32", "method.dropout=0",
    ]  # fmt: skip
    return plan_job(load_config(TrainConfig, overrides=[*settings, *overrides]))


def lose_a_node(data: str, model: str, output: str, seen: str) -> None:
    """Train on as many workers as there is room for; of two nodes of one CPU, one goes after step `LOST_AFTER`.

    Each step's loss becomes a line of `seen`: Ray's threads print to stdout at any moment.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)

    def show(metrics: dict) -> None:
        if "loss" in metrics:
            with open(seen, "a") as file:
                file.write(json.dumps({name: metrics[name] for name in ("step", "loss")}) + "\n")
        if metrics["step"] >= LOST_AFTER and node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)

    with connected(cluster.address, min_cpus=2):
        fine_tune(plan(data, model, output, "workers.count=[1,2]"), on_metrics=show)
    cluster.shutdown()


def gain_a_node(data: str, model: str, output: str, seen: str) -> None:
    """Train on as many workers as there is room for, of which a second comes after step `LOST_AFTER`; until there were
    some steps of two."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    of_two = 0

    def show(metrics: dict) -> None:
        nonlocal of_two
        if "loss" in metrics:
            with open(seen, "a") as file:
                file.write(json.dumps({name: metrics[name] for name in ("step", "loss", "workers")}) + "\n")
            of_two += metrics["workers"] == 2
        if metrics["step"] >= LOST_AFTER and not cluster.worker_nodes:
            cluster.add_node(num_cpus=1)
        if of_two == 2 * SAVE_SELDOM:
            os.kill(os.getpid(), signal.SIGINT)

    with suppress(Interrupted), connected(cluster.address, min_cpus=1):
        fine_tune(plan(data, model, output, *ENDLESS, f"save_every={SAVE_SELDOM}"), on_metrics=show)
    cluster.shutdown()


def resume_a_killed_run(data: str, model: str, output: str, seconds: str) -> None:
    """Kill the process of a run that may have all of the cluster, and resume it; how long until its first step."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    command = [sys.executable, __file__, "train_without_end", data, model, output, cluster.address]
    first = subprocess.Popen(command, start_new_session=True)
    metrics = Path(output) / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"loss"') < LOST_AFTER:
        assert first.poll() is None
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    started = time.monotonic()

    def end(metrics: dict) -> None:
        if "loss" in metrics and not os.path.exists(seconds):
            Path(seconds).write_text(str(time.monotonic() - started))
            os.kill(os.getpid(), signal.SIGINT)

    with suppress(Interrupted), connected(cluster.address, min_cpus=1):
        fine_tune(plan(data, model, output, *ENDLESS), resume=True, on_metrics=end)
    cluster.shutdown()


def train_without_end(data: str, model: str, output: str, address: str) -> None:
    with connected(address, min_cpus=1):
        fine_tune(plan(data, model, output, *ENDLESS))


def share_no_storage(data: str, model: str, output: str) -> None:
    """Train on three workers of two nodes, of which one has another disk where the run lies."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    start = f"{Path(sys.executable).parent / 'ray'} start --address={cluster.address} --num-cpus=2 --block"
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        node = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs none {Path(output).parent} && exec {start}"],
            env={**os.environ, "RAY_TMPDIR": folder},
            stdout=subprocess.DEVNULL,
        )
        try:
            with connected(cluster.address):
                while ray.cluster_resources()["CPU"] < 4:
                    time.sleep(0.5)
                fine_tune(plan(data, model, output, "workers.count=3"))
        except UserError as error:
            print(error)
        finally:
            node.terminate()
            node.wait(60)
            cluster.shutdown()


if __name__ == "__main__":
    functions = (lose_a_node, gain_a_node, resume_a_killed_run, train_without_end, share_no_storage)
    {function.__name__: function for function in functions}[sys.argv[1]](*sys.argv[2:])
