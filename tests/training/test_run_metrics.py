"""What Prometheus would see of a run; without Ray."""

from typing import Any

import pytest

from app.errors import Diverged, Interrupted, UserError
from app.training import metrics
from app.training.metrics import RunMetrics
from tests.recorded_metrics import Seen, recorded, values


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return recorded(monkeypatch, metrics)


def test_a_step_is_shown_with_its_speed_and_what_it_lacks_stays(seen) -> None:
    with RunMetrics("alpaca") as run:
        run.add({"step": 0, "eval_loss": 3.0, "precision": "bf16", "kernels": {}, "workers": 2})
        run.add({"step": 1, "loss": 2.5, "learning_rate": 1e-3, "tokens": 600, "step_s": 0.5, "workers": 2})
    assert values(seen, "train_step") == [0, 1] and values(seen, "train_eval_loss") == [3.0]
    assert seen["train_loss"] == [(2.5, {"run": "alpaca"})] and not seen["train_gradient_norm"]
    assert values(seen, "train_tokens_per_second") == [1200] and values(seen, "train_tokens") == [600]
    assert values(seen, "train_running") == [1]
    assert not any(gauge._values for gauge in (*run._gauges.values(), run._rate, run._running, run._reported))
    reported = values(seen, "train_reported_timestamp_seconds")
    assert len(reported) == 3 and reported == sorted(reported)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "stopped"),
        (Interrupted("stopped after step 3"), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (Diverged("the loss is nan at step 3"), "diverged"),
        (FloatingPointError("the loss is nan at step 3"), "diverged"),
        (UserError("the disk is full"), "failed"),
        (RuntimeError("a worker was lost too often"), "failed"),
    ],
)
def test_how_a_run_ended_is_counted(seen, error: BaseException | None, outcome: str) -> None:
    try:
        with RunMetrics("alpaca"):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    assert seen["train_runs_ended"] == [(1.0, {"run": "alpaca", "outcome": outcome})]


def test_a_run_that_says_that_it_is_finished_is_counted_as_that_and_once(seen) -> None:
    with RunMetrics("alpaca") as run:
        run.end("finished")
        run.end_by(RuntimeError("later"))
    assert [tags["outcome"] for _, tags in seen["train_runs_ended"]] == ["finished"]


def test_whoever_records_a_run_tells_of_it(seen, tmp_path, tiny_model, tiny_shards) -> None:
    """Two runs in a pack: one to its end, one that diverges."""
    from app.config import TrainConfig, validate
    from app.training.packed_runs import PackedRuns

    def config(name: str, **optimizer: float) -> Any:
        given = {
            "data": str(tiny_shards), "model": str(tiny_model), "output": str(tmp_path / name), "batch_size": 4,
            "max_steps": 6, "eval_every": 2, "save_every": 6, "samples": 0, "precision": "fp32",
            "workers": {"count": 1, "threads": 1}, "optimizer": optimizer,
            "tracking": {"uri": "none"},
        }  # fmt: skip
        return validate(TrainConfig, given)

    good, bad = config("good"), config("bad", learning_rate=1e30, clip_norm=1e30)
    runs = PackedRuns(good, pass_tokens=256)
    for name, run in (("good", good), ("bad", bad)):
        runs.join(name, run)
        try:
            while runs.go_on(name) is not None:
                pass
        except FloatingPointError:
            assert name == "bad"
        runs.leave(name)
    assert [tags for _, tags in seen["train_runs_ended"]] == [
        {"run": "good", "outcome": "finished"}, {"run": "bad", "outcome": "diverged"}
    ]  # fmt: skip
    assert [value for value, tags in seen["train_step"] if tags == {"run": "good"}] == list(range(7))
