"""Whole runs in a pack, with their folders; no Ray."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from app.config import TrainConfig, validate
from app.methods.delta import read_delta
from app.training import pack
from app.training.packed_runs import PackedRuns
from app.training.recording import Recording


@pytest.fixture
def run_config(tiny_model: Path, tiny_shards: Path, tmp_path: Path):
    def make(name: str, **settings: Any) -> TrainConfig:
        given = {
            "data": str(tiny_shards), "model": str(tiny_model), "output": str(tmp_path / name), "batch_size": 4,
            "max_steps": 6, "eval_every": 2, "save_every": 2, "samples": 0, "precision": "fp32",
            "workers": {"count": 1, "threads": 1}, "optimizer": {"learning_rate": 1e-2}, **settings,
        }  # fmt: skip
        return validate(TrainConfig, given)

    return make


def finish(runs: PackedRuns, name: str) -> list[dict[str, Any]]:
    rows = []
    while (row := runs.go_on(name)) is not None:
        rows.append(row)
    runs.leave(name)
    return rows


def together(runs: PackedRuns, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    threads = [threading.Thread(target=lambda name=name: found.update({name: finish(runs, name)})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_runs_go_on_to_their_next_evaluation_and_leave_all_files(run_config, tmp_path: Path) -> None:
    configs = {
        "a": run_config("a", method={"type": "lora", "rank": 2}),
        "b": run_config("b", method={"type": "adapter", "size": 4}, max_steps=5, eval_every=3),
    }
    runs = PackedRuns(configs["a"], pass_tokens=256)
    for name, config in configs.items():
        runs.join(name, config)
    rows = together(runs, ["a", "b"])
    assert [row["step"] for row in rows["a"]] == [0, 2, 4, 6]
    assert [row["step"] for row in rows["b"]] == [0, 3, 5]
    for name in configs:
        folder = tmp_path / name
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row for row in metrics if "eval_loss" in row] == rows[name]
        assert rows[name][-1]["eval_loss"] != rows[name][0]["eval_loss"]
        summary = json.loads((folder / "result.json").read_text())
        assert summary["eval_loss_after"] == rows[name][-1]["eval_loss"]
        assert 0 < summary["worker_hours"] < 1
        assert read_delta(folder / "delta").metadata["metrics"]["step"] == summary["steps"]
        assert (folder / "report.html").exists()


def test_a_run_waits_for_the_word_at_each_evaluation(run_config) -> None:
    runs = PackedRuns(run_config("a"), pass_tokens=256)
    runs.join("a", run_config("a", max_steps=8))
    assert runs.go_on("a")["step"] == 0
    assert runs.go_on("a")["step"] == 2
    other = run_config("b")
    runs.join("b", other)
    assert [row["step"] for row in finish(runs, "b")] == [0, 2, 4, 6]
    assert runs._runs["a"].member.step == 2  # nobody has asked for more
    assert runs.go_on("a")["step"] == 4
    assert runs.present(["a", "b", "c"]) == ["a"]
    runs.leave("a")
    assert runs.present(["a"]) == []
    with pytest.raises(KeyError):
        runs.go_on("a")


def test_a_run_that_left_goes_on_from_its_checkpoint_in_another_pack(run_config, tmp_path: Path) -> None:
    whole, broken = run_config("whole"), run_config("broken")
    runs = PackedRuns(whole, pass_tokens=256)
    runs.join("whole", whole)
    expected = finish(runs, "whole")
    runs.join("broken", broken)
    for _ in range(3):
        runs.go_on("broken")
    runs.leave("broken")
    other = PackedRuns(broken, pass_tokens=256)
    other.join("broken", broken)
    rest = finish(other, "broken")
    assert [row["step"] for row in rest] == [6]
    assert rest[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], abs=1e-5)
    metrics = [json.loads(line)["step"] for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()]
    assert metrics == list(range(7))


def test_a_run_whose_result_is_missing_gets_it_without_a_step(run_config, tmp_path: Path) -> None:
    config = run_config("a")
    runs = PackedRuns(config, pass_tokens=256)
    runs.join("a", config)
    expected = finish(runs, "a")
    for name in ("result.json", "delta/delta.json", "delta/delta.safetensors"):
        (tmp_path / "a" / name).unlink()
    other = PackedRuns(config, pass_tokens=256)
    other.join("a", config)
    assert finish(other, "a") == expected[-1:]
    assert json.loads((tmp_path / "a/result.json").read_text())["steps"] == 6
    assert read_delta(tmp_path / "a/delta").method.type == "lora"


def test_what_goes_wrong_in_a_step_is_told_to_all_that_were_in_it(run_config, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = PackedRuns(run_config("a"), pass_tokens=256)
    for name in ("a", "b"):
        runs.join(name, run_config(name))
        assert runs.go_on(name)["step"] == 0
    real, tries = runs._pack.step, []

    def fail(members: list[Any]) -> None:
        tries.append([member.name for member in members])
        raise ZeroDivisionError

    monkeypatch.setattr(runs._pack, "step", fail)
    for name in ("a", "b"):
        with pytest.raises(ZeroDivisionError):
            runs.go_on(name)
    assert tries == [["a"], ["b"]]  # who has failed is not stepped on
    monkeypatch.setattr(runs._pack, "step", real)
    runs.join("a", run_config("a"))
    assert [row["step"] for row in finish(runs, "a")] == [0, 2, 4, 6]


def test_a_run_that_joins_anew_while_its_step_is_recorded_has_each_step_once(
    run_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a trial's process is lost, and its next try comes while the pack still steps the run."""
    config = run_config("a")
    runs = PackedRuns(config, pass_tokens=256)
    runs.join("a", config)
    assert runs.go_on("a")["step"] == 0
    is_recording, may_record = threading.Event(), threading.Event()
    real = Recording.add

    def slow(recording: Recording, metrics: dict[str, Any]) -> None:
        is_recording.set()
        may_record.wait(60)
        real(recording, metrics)

    monkeypatch.setattr(Recording, "add", slow)
    lost = threading.Thread(target=lambda: pytest.raises(KeyError, runs.go_on, "a"))
    lost.start()
    assert is_recording.wait(60)
    anew = threading.Thread(target=runs.join, args=("a", config))
    anew.start()
    anew.join(0.5)
    may_record.set()
    for thread in (anew, lost):
        thread.join(60)
    assert [row["step"] for row in finish(runs, "a")] == [0, 2, 4, 6]
    steps = [json.loads(line)["step"] for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(7))


def test_a_loss_that_diverges_is_told_to_its_own_run(run_config, tmp_path: Path) -> None:
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    good = run_config("good", tracking=tracking)
    bad = run_config("bad", optimizer={"learning_rate": 1e30, "clip_norm": 1e30}, tracking=tracking)
    runs = PackedRuns(good, pass_tokens=256)
    runs.join("good", good)
    runs.join("bad", bad)
    failures: list[Exception] = []

    def fail() -> None:
        try:
            finish(runs, "bad")
        except FloatingPointError as error:
            failures.append(error)

    thread = threading.Thread(target=fail)
    thread.start()
    assert [row["step"] for row in finish(runs, "good")] == [0, 2, 4, 6]
    thread.join(60)
    assert "lower optimizer.learning_rate" in str(failures[0])
    client = MlflowClient(tracking["uri"])
    ended = {
        name: client.get_run(json.loads((tmp_path / name / "mlflow.json").read_text())["run_id"]).info.status
        for name in ("good", "bad")
    }
    assert ended == {"good": "FINISHED", "bad": "FAILED"}


def test_runs_that_join_at_once_begin_with_the_weights_that_each_has_alone(
    run_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has one random stream for all threads: who is between its seed and its draws has it to itself."""
    apply_method = pack.apply_method

    def apply_slowly(*given: Any) -> Any:
        time.sleep(0.1)  # the others' seeds come now
        return apply_method(*given)

    monkeypatch.setattr(pack, "apply_method", apply_slowly)
    names = [f"seed-{seed}" for seed in range(4)]
    runs = PackedRuns(run_config("a"), pass_tokens=256)
    threads = [
        threading.Thread(target=runs.join, args=(name, run_config(name, seed=seed))) for seed, name in enumerate(names)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone = PackedRuns(run_config("a"), pass_tokens=256)
    for seed, name in enumerate(names):
        alone.join(name, run_config(f"alone-{name}", seed=seed))
        mine, expected = (pack_of._runs[name].member.optimizer.weights() for pack_of in (runs, alone))
        assert all(torch.equal(mine[key], expected[key]) for key in expected), name


def test_losses_do_not_depend_on_who_shares_a_pack_with_whom(run_config) -> None:
    def losses_in(packs: list[list[int]], where: str) -> dict[int, list[float]]:
        found = {}
        for ranks in packs:
            configs = {rank: run_config(f"{where}-{rank}", method={"type": "lora", "rank": rank}) for rank in ranks}
            runs = PackedRuns(configs[ranks[0]], pass_tokens=256)
            threads = [threading.Thread(target=runs.join, args=(str(rank), configs[rank])) for rank in ranks]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            rows = together(runs, [str(rank) for rank in ranks])
            found |= {rank: [row["eval_loss"] for row in rows[str(rank)]] for rank in ranks}
        return found

    expected = losses_in([[1, 2, 3, 4]], "one")
    assert len({losses[-1] for losses in expected.values()}) == 4
    for rank, losses in losses_in([[1, 3], [4, 2]], "two").items():
        assert losses == pytest.approx(expected[rank], abs=1e-5)
