"""Data is prepared, models are trained and swept on three hosts: what a host, a link, a disk that goes takes along."""

import json
import time
from pathlib import Path

import pytest

from tests.chaos.cluster import Cluster, wait_for
from tests.chaos.hosts import fill
from tests.chaos.runs import Watched, checkpoints_of, steps_of, workers_of

STEPS, SAVE_EVERY, LOST_AFTER = 120, 10, 25
SWEPT_STEPS = 300
WITHOUT_END, SAVE_SELDOM = 20_000, 50
"""Of a run that a node joins: it is stopped; and some of its steps are computed again, which shows their losses."""


def train_command(data: Path, model: Path, output: Path, *more: str) -> list[str]:
    return [
        "jobs/train.py", f"data={data}", f"model={model}", f"output={output}", f"max_steps={STEPS}", "epochs=20",
        "batch_size=12", f"save_every={SAVE_EVERY}", "keep_last=99", f"eval_every={STEPS}", "precision=fp32",
        "method.rank=2", "method.dropout=0", "workers.count=3", "workers.cpus=2", "workers.threads=1", *more,
    ]  # fmt: skip


def test_a_training_node_is_killed(cluster: Cluster, data: Path, model: Path, record) -> None:
    run = cluster.shared / "killed"
    with Watched(run) as watched:
        job = cluster.submitted(*train_command(data, model, run, "workers.count=[1,3]"), log="train.log")
        watched.wait_for_step(LOST_AFTER)
        assert len(set(cluster.places_of("RayTrainWorker"))) == 3, "each worker has a host of its own"
        committed = checkpoints_of(run)
        cluster.workers[2].kill()
        killed_at, reached = time.monotonic(), watched.step
        assert job.wait(400) == 0, (cluster.head.disk / "train.log").read_text()
    assert steps_of(run) == list(range(1, STEPS + 1))
    for step, losses in watched.losses.items():
        assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-4), f"step {step} came out otherwise"
    kept = set(committed) <= set(checkpoints_of(run))
    again, seconds = watched.steps_again(), watched.seconds_to_pass(reached, since=killed_at)
    assert kept and again <= SAVE_EVERY + 1
    record(
        "a worker node is killed while training on 3 nodes",
        "the run goes on with 2 workers from its newest checkpoint; every loss as it would have been",
        steps_again=again, seconds=seconds, met=kept and seconds < 60,
    )  # fmt: skip


def test_a_node_comes_while_training(cluster: Cluster, data: Path, model: Path, record) -> None:
    run, late = cluster.shared / "grown", cluster.workers[2]
    late.end_processes()
    cluster.wait_for_nodes([cluster.head, *cluster.workers[:2]])
    command = train_command(
        data, model, run, "workers.count=[1,3]", f"max_steps={WITHOUT_END}", f"epochs={WITHOUT_END}",
        f"save_every={SAVE_SELDOM}", "optimizer.warmup_fraction=0", "tracking.uri=none",
    )  # fmt: skip
    with Watched(run) as watched:
        job = cluster.submitted(*command, log="grown.log")
        watched.wait_for_step(LOST_AFTER)
        cluster.start_workers([late])
        cluster.wait_for_nodes([cluster.head, *cluster.workers])
        came_at = time.monotonic()
        wait_for(lambda: workers_of(run)[-1] == 3, what="a step on three workers", within_s=300)
        seconds, grown = time.monotonic() - came_at, len(workers_of(run))
        paused_s = watched.longest_pause_s(since=came_at)
        assert len(set(cluster.places_of("RayTrainWorker"))) == 3, "each worker has a host of its own"
        watched.wait_for_step(grown + SAVE_SELDOM)
        cluster.stop_jobs()
        job.wait(100)
    workers = workers_of(run)
    printed = (cluster.head.disk / "grown.log").read_text()
    assert steps_of(run) == list(range(1, len(workers) + 1)) and workers == sorted(workers), printed
    assert set(workers) == {2, 3} and "--resume goes on from there" in printed, printed
    for step, losses in watched.losses.items():
        assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-4), f"step {step} came out otherwise"
    again = watched.steps_again()
    assert again <= SAVE_SELDOM + 1
    record(
        "a node comes while training on 2 nodes",
        f"the run takes it in by itself, {seconds:.0f} s after its start (Ray Train looks every 60 s; the run goes on "
        "meanwhile), and goes on with 3 workers from its newest checkpoint; every loss as it would have been",
        steps_again=again, seconds=paused_s, met=paused_s < 60,
    )  # fmt: skip


def test_a_node_is_killed_while_data_is_prepared(cluster: Cluster, many_records: Path, model: Path, record) -> None:
    def command(output: Path) -> list[object]:
        return [
            "jobs/prepare_data.py", f"source={many_records}", f"output={output}", f"model={model}", "max_length=96",
            "records_per_shard=50", "validation_fraction=0.1",
        ]  # fmt: skip

    def hashes(output: Path) -> list[str]:
        return [shard["sha256"] for shard in json.loads((output / "manifest.json").read_text())["shards"]]

    undisturbed, output = cluster.shared / "undisturbed", cluster.shared / "disturbed/data"
    output.parent.mkdir()
    began = time.monotonic()
    cluster.submit(*command(undisturbed))
    usual_s = time.monotonic() - began
    began = time.monotonic()
    job = cluster.submitted(*command(output), log="prepare.log")
    wait_for(lambda: list(output.parent.rglob("*.parquet")), what="a shard", within_s=300)
    cluster.workers[0].kill()
    num_done = len(list(output.parent.rglob("*.parquet")))
    assert job.wait(400) == 0, (cluster.head.disk / "prepare.log").read_text()
    later_s = time.monotonic() - began - usual_s
    same = hashes(output) == hashes(undisturbed)
    assert same and num_done < len(hashes(output)) / 2, "it was killed in the midst of it"
    record(
        "a worker node is killed while data is prepared", "its tasks run elsewhere; the shards are the same "
        "as without the fault; seconds: how much longer it took",
        seconds=max(0.0, later_s), met=same and later_s < 60,
    )  # fmt: skip


def test_a_node_is_killed_in_a_sweep(cluster: Cluster, data: Path, model: Path, record) -> None:
    output = cluster.shared / "sweep-killed"
    job = cluster.submitted(
        "-m", "tune.sweep", f"output={output}", f"train.data={data}", f"train.model={model}",
        f"train.max_steps={SWEPT_STEPS}", "train.epochs=20",
        "train.eval_every=6", "train.save_every=6", "train.batch_size=8", "train.precision=fp32",
        "train.workers.cpus=2", "train.workers.threads=1", "space.method.rank=[1,2,3,4]", "search.type=grid",
        "scheduler.type=none", "finals.trials=0", "pack_size=2", "tracking.uri=none", log="sweep.log",
    )  # fmt: skip

    def rows() -> dict[str, int]:
        """Of each trial, one of step 0 and one of each step."""
        files = output.glob("trials/*/run/metrics.jsonl")
        return {file.parts[-3]: len(file.read_text().splitlines()) for file in files}

    wait_for(lambda: len(rows()) == 4 and min(rows().values()) > 8, what="four trials under way", within_s=400)
    cluster.host_at(cluster.places_of("_PackActor")[0]).kill()
    killed_at, before = time.monotonic(), rows()
    lowest = dict(before)
    assert max(before.values()) < SWEPT_STEPS, "it was killed in the midst of it"

    def all_go_on() -> bool:
        now = rows()
        for name, number in now.items():
            lowest[name] = min(lowest[name], number)
        return all(number > before[name] or number == SWEPT_STEPS + 1 for name, number in now.items())

    wait_for(all_go_on, what="trials that go on", within_s=400)
    seconds = time.monotonic() - killed_at
    assert job.wait(500) == 0, (cluster.head.disk / "sweep.log").read_text()
    again = sum(before[name] - lowest[name] for name in before)
    printed = (cluster.head.disk / "sweep.log").read_text()
    assert "4 finished, 0 stopped, 0 failed" in printed, printed
    for file in output.glob("trials/*/run/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
        assert steps == list(range(SWEPT_STEPS + 1)), file
    record(
        "a worker node with a pack of trials is killed in a sweep",
        "its trials go on in another pack; 4 of 4 finished, none of their steps is missing",
        steps_again=again, seconds=seconds, met=seconds < 60,
    )  # fmt: skip


@pytest.mark.usefixtures("needs_namespaces")
def test_the_disk_is_full_while_training(cluster: Cluster, data: Path, model: Path, record) -> None:
    small = cluster.shared / "small"
    run, filler = small / "run", small / "filler"
    with Watched(run) as watched:
        job = cluster.submitted(*train_command(data, model, run, "tracking.uri=none"), log="full.log")
        watched.wait_for_step(LOST_AFTER)
        fill(filler)
        status = job.wait(400)
    filler.unlink()
    committed, reached = checkpoints_of(run), watched.step
    printed = (cluster.head.disk / "full.log").read_text()
    assert status != 0 and "No space left on device" in printed, printed
    again = reached - max(committed)
    began = time.monotonic()
    with Watched(run) as watched:
        cluster.submit(*train_command(data, model, run, "tracking.uri=none", "--resume"))
    seconds = watched.seconds_to_pass(reached, since=began)
    kept = set(committed) <= set(checkpoints_of(run))
    assert kept and steps_of(run) == list(range(1, STEPS + 1))
    record(
        "the disk of the run is full", "the run ends and says what to do; once there is space, --resume goes on",
        steps_again=again, seconds=seconds, met=kept and seconds < 60,
    )  # fmt: skip
