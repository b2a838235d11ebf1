from pathlib import Path

import pytest

from app.training.cost import WorkerHours


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def hours(folder: Path, clock: Clock, *, workers: int = 2, price: float | None = 3.0, resume: bool = False):
    return WorkerHours(folder, workers=workers, price_per_hour=price, resume=resume, clock=clock)


def test_the_cost_is_price_times_hours_of_as_many_workers_as_there_were(tmp_path: Path) -> None:
    clock = Clock()
    counted = hours(tmp_path, clock)
    clock.now_s = 1800
    counted.count(4)  # two until now, four from now on
    clock.now_s = 3600
    counted.end()
    clock.now_s = 99999
    counted.end()
    figures = counted.figures(tokens=2_000_000)
    assert figures == {"worker_hours": 3.0, "cost": 9.0, "cost_per_million_tokens": 4.5}


def test_a_resumed_run_adds_up_its_sessions_each_at_its_price(tmp_path: Path) -> None:
    clock = Clock()
    killed = hours(tmp_path, clock, workers=1, price=None)
    clock.now_s = 3600
    killed.count(1)  # and no end: what was written last counts
    second = hours(tmp_path, clock, workers=2, price=10.0, resume=True)
    clock.now_s += 3600
    second.end()
    third = hours(tmp_path, clock, workers=1, price=1.0, resume=True)
    clock.now_s += 3600
    third.end()
    figures = third.figures(tokens=1_000_000)
    assert figures["worker_hours"] == pytest.approx(4)
    assert figures["cost"] == pytest.approx(1 * 1.0 + 2 * 10.0 + 1 * 1.0), "one without a price, at today's"


def test_a_new_run_in_a_folder_does_not_pay_for_an_old_one(tmp_path: Path) -> None:
    clock = Clock()
    old = hours(tmp_path, clock)
    clock.now_s = 3600
    old.end()
    assert hours(tmp_path, clock).figures(tokens=0) == {
        "worker_hours": 0.0,
        "cost": 0.0,
        "cost_per_million_tokens": None,
    }


def test_without_a_price_there_is_no_cost(tmp_path: Path) -> None:
    clock = Clock()
    counted = hours(tmp_path, clock, price=None)
    clock.now_s = 7200
    counted.end()
    assert counted.figures(tokens=5) == {"worker_hours": 4.0, "cost": None, "cost_per_million_tokens": None}
