"""What stands between Ray Tune and a sweep's folder, and what is shown of it; no Ray cluster."""

import asyncio
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from past_trials import past_trial
from rich.console import Console

from app import console
from app.config import SweepConfig
from app.config.sweep import BudgetConfig
from app.display.sweep import show_end, show_results, watched_trials
from tune.driver import Budget, TrialSource, Watch
from tune.pack_actor import Turnstile
from tune.plan import base_of, packed_of, plan_sweep
from tune.records import read_records
from tune.report import ranking_table
from tune.results import write_results
from tune.search import open_search
from tune.sweep import _scheduler

SweepOf = Callable[..., SweepConfig]


class _Calls:
    """An actor's method, of which is kept what it was called with."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def remote(self, *given: Any) -> None:
        self.given.append(given)


def actor(*methods: str) -> Any:
    return SimpleNamespace(**{method: _Calls() for method in methods})


@pytest.mark.parametrize(
    ("budget", "spent"),
    [
        ({"tokens": 60}, "budget.tokens=60"),
        ({"tokens": 61}, None),
        ({"cost": 0.5}, "budget.cost=0.5"),
        ({"cost": 0.51}, None),
        ({"hours": 2}, None),
        ({"hours": 1e-15}, "budget.hours=1e-15"),
    ],
)
def test_a_budget_of_tokens_time_or_money_ends_all_trials(
    sweep_of: SweepOf, budget: dict[str, float], spent: str | None
) -> None:
    sweep = sweep_of()
    for number in range(2):
        trial = past_trial(sweep, number, {"method.rank": 1}, [6.0, 5.0, 4.0], state="running")
        hours = [{"worker_hours": 0.05, "price_per_hour": 5.0}]
        (Path(trial.config.output) / "worker_hours.json").write_text(json.dumps(hours))
    of_all = Budget(BudgetConfig(**budget), Watch(Path(sweep.output)), lambda: False)  # type: ignore[arg-type]
    assert of_all.spent() == spent and of_all.stop_all() == (spent is not None)
    assert Budget(BudgetConfig(), Watch(Path(sweep.output)), lambda: True).stop_all()  # Ctrl-C


def decisions(scheduler: Any, losses: dict[str, list[float]]) -> dict[str, list[str]]:
    """What `scheduler` says to each trial, all of which are evaluated after steps 2, 4, …, side by side."""
    from ray.tune.experiment import Trial

    trials = {name: Trial("stub", stub=True) for name in losses}
    said: dict[str, list[str]] = {name: [] for name in losses}
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)
    for place in range(max(map(len, losses.values()))):
        for name, trial in trials.items():
            if place < len(losses[name]) and "STOP" not in said[name]:
                result = {"step": 2 * (place + 1), "eval_loss": losses[name][place]}
                said[name].append(scheduler.on_trial_result(None, trial, result))
    return said


def test_median_stopping_ends_what_is_worse_than_the_others_means(sweep_of: SweepOf) -> None:
    sweep = sweep_of(scheduler={"type": "median", "first_steps": 4, "trials": 2})
    losses = {"a": [5.0, 4.0, 3.0], "b": [5.0, 4.0, 3.0], "c": [5.0, 4.0, 3.0], "bad": [9.0, 8.9, 8.8]}
    said = decisions(_scheduler(sweep, plan_sweep(sweep)), losses)
    assert said["bad"] == ["CONTINUE", "STOP"]  # not before its first steps
    assert all("STOP" not in said[name] for name in "abc")


def test_asha_lets_one_of_so_many_go_on_from_a_rung(sweep_of: SweepOf) -> None:
    sweep = sweep_of(scheduler={"type": "asha", "first_steps": 2, "factor": 2})
    losses = {"a": [5.0, 4.0, 3.0], "b": [6.0, 5.0, 4.0], "c": [7.0, 6.0, 5.0], "d": [8.0, 7.0, 6.0]}
    said = decisions(_scheduler(sweep, plan_sweep(sweep)), losses)
    assert "STOP" not in said["a"] and said["c"] == ["STOP"] and said["d"] == ["STOP"]


def test_a_trial_goes_to_the_emptiest_pack_that_holds_its_base(sweep_of: SweepOf) -> None:
    kinds = [{"method.rank": [1, 2, 3]}, {"method.type": "bitfit"}, {"method.rank": 1, "precision": "bf16"}]
    sweep = sweep_of(space=kinds)
    bases = {trial.precision: base_of(trial) for trial in plan_sweep(sweep).trials}
    packs, turnstile = [actor("leave") for _ in range(3)], actor("leave")
    source = TrialSource(
        sweep, open_search(sweep), [], packs=packs, pack_keys=[bases["fp32"], bases["fp32"], bases["bf16"]],
        turnstile=turnstile,
    )  # fmt: skip
    assert [source.suggest(str(number))["pack"] for number in range(5)] == [0, 1, 0, None, 2]
    assert source.suggest("5") == TrialSource.FINISHED
    source.on_trial_complete("1", error=True)
    assert packs[1].leave.given == [("1",)] and turnstile.leave.given == [(1,)]
    assert read_records(Path(sweep.output))[1].state == "failed"


def test_a_trial_waits_where_its_pack_is_full_and_one_that_needs_none_goes_first(sweep_of: SweepOf) -> None:
    sweep = sweep_of(space=[{"method.rank": [1, 2]}, {"method.type": "bitfit"}], pack_size=1)
    (base,) = {base_of(trial) for trial in packed_of(sweep, plan_sweep(sweep))}
    pack, turnstile = actor("leave"), actor("leave")
    given: dict[str, Any] = {"packs": [pack], "pack_keys": [base], "turnstile": turnstile}
    source = TrialSource(sweep, open_search(sweep), [], **given)
    assert source.suggest("0")["pack"] == 0
    assert source.suggest("1") is None and source.suggest("1") is None
    source.on_trial_complete("0", error=True)
    second = source.suggest("2")
    assert second["pack"] == 0 and second["folder"].endswith("0001")
    assert source.suggest("3")["pack"] is None
    assert source.suggest("4") == TrialSource.FINISHED

    resumed = TrialSource(sweep, None, [replace(r, state="running") for r in read_records(Path(sweep.output))], **given)
    found = [resumed.suggest(str(number)) for number in range(3)]
    assert found[2] is None
    assert [(each["folder"][-4:], each["pack"]) for each in found[:2]] == [("0000", 0), ("0002", None)]


def test_as_many_runs_of_their_own_pass_as_there_is_room_for() -> None:
    async def run() -> None:
        turnstile = Turnstile(2)
        await turnstile.enter(0)
        await turnstile.enter(1)
        waiting = asyncio.create_task(turnstile.enter(2))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await turnstile.leave(7)  # one that is not inside frees no place
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await turnstile.leave(0)
        await asyncio.wait_for(waiting, 5)

    asyncio.run(run())


def test_a_trial_whose_process_was_lost_has_its_place_still_and_no_other() -> None:
    async def run() -> None:
        turnstile = Turnstile(1)
        await turnstile.enter(0)
        await asyncio.wait_for(turnstile.enter(0), 5)  # it did not leave, and begins again
        waiting = asyncio.create_task(turnstile.enter(1))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await turnstile.leave(0)
        await asyncio.wait_for(waiting, 5)

    asyncio.run(run())


def test_the_terminal_has_a_table_while_it_runs_and_the_ranking_at_the_end(
    sweep_of: SweepOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=shown, force_terminal=True, width=120, no_color=True))
    sweep = sweep_of(space={"method.rank": [1, 2]})
    trials = [
        past_trial(sweep, 0, {"method.rank": 1}, [6.0, 5.0, 4.5], state="finished"),
        past_trial(sweep, 1, {"method.rank": 2}, [6.0, 4.0], state="running"),
    ]
    with watched_trials(lambda: trials):
        pass
    table = shown.getvalue()
    assert "1 over, 1 running" in table and "rank=1" in table and "4.5000" in table and "4.0000" in table
    assert "finished" in table and "running" in table
    show_end(trials[0], {"method.rank": "1"})
    assert "trial   0  finished  held-out loss 4.5000 at step 4  (rank 1)" in shown.getvalue()
    results = write_results(sweep, trials, ended_by="budget.hours=1")
    show_results(sweep.output, results, *ranking_table(results), command="pacos train data=x")
    end = shown.getvalue()
    assert "The best once more: pacos train data=x" in end and "budget.hours=1 was spent" in end
    assert f"pacos promote --best {sweep.output}"[:60] in end.replace("\n", "")


def test_the_table_counts_all_that_run_also_those_that_it_does_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(
        console, "console", Console(file=shown, force_terminal=True, width=120, height=60, no_color=True)
    )
    about = {"state": "running", "values_now": {}, "tokens": 1, "step": 2, "loss": None}
    trials = [SimpleNamespace(number=1000 + number, **about) for number in range(25)]
    with watched_trials(lambda: trials):
        pass
    table = shown.getvalue()
    assert "0 over, 25 running" in table and "1024" in table and "1004" not in table
