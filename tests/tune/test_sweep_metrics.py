"""What Prometheus would see of a sweep; without Ray."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from tests.recorded_metrics import Seen, recorded, values
from tune import metrics


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    monkeypatch.setattr(metrics, "_TELL_EVERY_S", 0.01)
    return recorded(monkeypatch, metrics)


def trial(state: str, loss: float | None, tokens: int = 10) -> Any:
    return SimpleNamespace(state=state, loss=loss, tokens=tokens)


def test_trials_are_counted_by_state_and_the_lowest_loss_is_the_best(seen) -> None:
    sweep = metrics.SweepMetrics("ranks")
    sweep.set([])
    sweep.set([trial("running", None), trial("stopped", 2.5), trial("finished", 2.25), trial("finished", 2.75)])
    latest = {tags["state"]: value for value, tags in seen["sweep_trials"]}
    assert latest == {"running": 1, "finished": 2, "stopped": 1, "failed": 0}
    assert seen["sweep_best_loss"] == [(2.25, {"sweep": "ranks"})]
    assert values(seen, "sweep_tokens") == [0, 40]


def test_it_is_told_again_and_again_until_the_sweep_is_over(seen) -> None:
    told, asked = threading.Event(), 0

    def records() -> list[Any]:
        nonlocal asked
        asked += 1
        if asked == 3:
            told.set()
        return []

    with metrics.told_to_prometheus("ranks", records):
        assert told.wait(30)
    assert "sweep metrics" not in {thread.name for thread in threading.enumerate()}
