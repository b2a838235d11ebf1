"""Population-based training: what is decided, refused, handed over and written down; no Ray."""

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from past_trials import end_with, past_trial
from ray.exceptions import ActorUnavailableError

from app.config import SweepConfig, TrainConfig
from app.errors import UserError
from app.training.checkpoint_store import UNWRITTEN, CheckpointStore
from app.training.checkpointing import Checkpoint
from app.training.packed_runs import PackedRuns
from app.training.takeover import hand_over
from tune.exchanges import Exchanges, find_lost
from tune.plan import plan_sweep
from tune.population import Exchange, Takeover, decide, read_exchange, taken_over, value_of, write_exchange
from tune.records import TrialRecord, begin_record, read_record, read_records
from tune.results import command_of, write_results
from tune.space import trial_config, trial_folder
from tune.sweep import open_folder
from tune.trial import _last_row

SweepOf = Callable[..., SweepConfig]
RATE = "optimizer.learning_rate"


@pytest.fixture
def population_of(sweep_of: SweepOf) -> SweepOf:
    """A population of four that meets after steps 2, 4 and 6, with other `settings`."""

    def make(**settings: Any) -> SweepConfig:
        scheduler = {"type": "population", "mutate": [RATE], "every": 2, "resample": 0, **settings.pop("scheduler", {})}
        given = {
            "space": {RATE: {"log_uniform": [1e-5, 1e-1]}, "method.rank": [1, 2, 3]},
            "search": {"type": "random"},
            "budget": {"trials": 4},
            **settings,
        }
        return sweep_of(scheduler=scheduler, **given)

    return make


def trials_of(sweep: SweepConfig, losses: list[float], **about: Any) -> list[TrialRecord]:
    """All of which stand after step 2."""
    for number, loss in enumerate(losses):
        values = {RATE: 1e-3 * (number + 1), "method.rank": 1 + number % 3}
        past_trial(sweep, number, values, [6.0, loss], state="running", **about)
    return read_records(Path(sweep.output))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scheduler": {"mutate": ["method.rank"]}},
         r"mutate='method\.rank' cannot change while a trial trains; .*Take method\.rank out of mutate and leave"),
        ({"scheduler": {"mutate": ["batch_size"]}}, "mutate='batch_size' cannot change"),
        ({"scheduler": {"mutate": [RATE, "label_smoothing"]}}, "'label_smoothing' has nothing to change to"),
        ({"space": {RATE: 1e-3, "method.rank": [1, 2]}}, "has nothing to change to; give .* a range or a list"),
        ({"search": {"type": "tpe"}}, "take search.type=random or grid"),
        ({"budget": {"trials": 1}}, "two at least"),
        ({"scheduler": {"every": 3}}, r"scheduler\.every=3: .*a multiple of train\.eval_every=2"),
        ({"scheduler": {"every": 8}}, "no less than the 8 steps of a trial"),
        ({"space": {RATE: [1e-3, 1e-2], "max_steps": [4, 8]}}, "as many steps each"),
        ({"train": {"changes": [{"after": 2, "label_smoothing": 0.1}]}}, "changes: .*leave them out"),
        ({"space": [{"method.type": "lora", RATE: [1e-3, 1e-2]}, {"method.type": "bitfit", RATE: [1e-3, 1e-2]}]},
         "all are packed over one base .*set pack=never"),
    ],
)  # fmt: skip
def test_what_a_population_cannot_change_or_compare_is_refused_before_any_trial(
    population_of: SweepOf, settings: dict[str, Any], told: str
) -> None:
    plan_sweep(population_of())
    with pytest.raises(UserError, match=told):
        plan_sweep(population_of(**settings))


def test_a_population_that_is_resumed_has_the_trials_that_it_had(population_of: SweepOf) -> None:
    open_folder(population_of(), resume=False)
    open_folder(population_of(budget={"trials": 4, "hours": 3}), resume=True)
    with pytest.raises(UserError, match=r"budget\.trials: the population was started with 4, not 6; .* keep it"):
        open_folder(population_of(budget={"trials": 6}), resume=True)


def test_the_worst_take_over_the_best_and_change_what_may_change(population_of: SweepOf) -> None:
    sweep = population_of()
    trials = trials_of(sweep, [5.2, 5.0, float("inf"), 5.1])
    exchange = decide(sweep, trials, step=2)
    assert exchange == decide(sweep, reversed(trials), step=2)
    (takeover,) = exchange.takeovers
    assert (takeover.weak, takeover.strong, takeover.before) == (2, 1, {RATE: 2e-3})
    assert takeover.after[RATE] in (pytest.approx(1.6e-3), pytest.approx(2.4e-3))

    half = population_of(scheduler={"fraction": 0.5})
    assert {(each.weak, each.strong) for each in decide(half, trials, step=2).takeovers} <= {
        (weak, strong) for weak in (0, 2) for strong in (1, 3)
    }
    assert decide(sweep, trials_of(population_of(output=sweep.output + "-2"), [5.0] * 4), step=2).takeovers == ()


def test_changes_keep_to_the_range_and_go_to_the_neighbours_of_a_list(population_of: SweepOf) -> None:
    space = {RATE: {"log_uniform": [1.9e-3, 2.1e-3]}, "label_smoothing": [0.0, 0.1, 0.2], "method.rank": [1, 2, 3]}
    sweep = population_of(space=space, scheduler={"mutate": [RATE, "label_smoothing"]})
    for number, loss in enumerate([5.2, 5.0, 5.3, 5.1]):
        past_trial(sweep, number, {RATE: 2e-3, "label_smoothing": 0.1}, [6.0, loss], state="running")
    found = [decide(sweep, read_records(Path(sweep.output)), step=2).takeovers[0].after]
    drawn = population_of(space=space, scheduler={"mutate": [RATE, "label_smoothing"], "resample": 1, "seed": 3})
    found.append(decide(drawn, read_records(Path(sweep.output)), step=2).takeovers[0].after)
    assert found[0][RATE] in (1.9e-3, 2.1e-3) and found[0]["label_smoothing"] in (0.0, 0.2)
    assert 1.9e-3 < found[1][RATE] < 2.1e-3 and found[1]["label_smoothing"] in (0.0, 0.1, 0.2)


def test_a_trial_that_took_over_another_is_that_one_with_the_change(population_of: SweepOf) -> None:
    sweep = population_of(train={"checkpoints": "s3://bucket/ranks?region=eu"})
    trials = trials_of(sweep, [5.0, 5.1, 5.2, 5.3], weights=7)
    first = taken_over(sweep, trials[3], trials[0], Exchange(2, {}, [Takeover(3, 0, {}, {RATE: 1.2e-3})]))
    second = taken_over(sweep, trials[2], first, Exchange(4, {}, [Takeover(2, 3, {}, {RATE: 1.4e-3})]))
    assert (second.number, second.values, second.lineage) == (2, trials[0].values, ((0, 2), (3, 4)))
    assert [(change.after, change.optimizer.learning_rate) for change in second.config.changes] == [
        (2, 1.2e-3), (4, 1.4e-3),
    ]  # fmt: skip
    assert [value_of(second.config, RATE, after=step) for step in (0, 1, 2, 3, 4, 9)] == [
        1e-3, 1e-3, 1.2e-3, 1.2e-3, 1.4e-3, 1.4e-3,
    ]  # fmt: skip
    assert second.config.output.endswith("trials/0002/run-from-4")
    assert second.config.checkpoints == "s3://bucket/ranks/0002/run-from-4?region=eu"
    assert second.config.tracking.run_name == "sweep-0002-from-4"
    begin_record(second)
    assert read_record(second.folder).config == second.config
    assert 'changes=[{"after": 2, ' in command_of(second.config)


class _Trials:
    """Trials of a population, each of which waits in a task of its own."""

    def __init__(self, sweep: SweepConfig, *, size: int = 4, gone: tuple[int, ...] = ()) -> None:
        self.handed: list[tuple[int, str, int | None]] = []
        self.fails = False
        self.lost: set[int] = set()
        self.exchanges = Exchanges(
            sweep, self._hand_over, find_lost=self._find_lost, size=size, total_steps=8, gone=gone
        )

    async def _hand_over(self, strong: TrialRecord, target: TrainConfig, pack: int | None) -> None:
        if self.fails:
            raise OSError("no space left")
        self.handed.append((strong.number, Path(target.output).parent.name, pack))

    async def _find_lost(self, waiting: Mapping[int, int | None]) -> list[int]:
        return [number for number in waiting if number in self.lost]

    def meet(self, number: int, step: int = 2, pack: int | None = 0) -> "asyncio.Task[bool]":
        return asyncio.create_task(self.exchanges.meet(number, step, pack))


def test_trials_wait_for_each_other_and_the_weak_one_alone_takes_over(population_of: SweepOf) -> None:
    sweep = population_of()
    trials_of(sweep, [5.0, 5.1, 5.2, 5.3])

    async def run() -> None:
        trials = _Trials(sweep)
        for step in (0, 3, 8):  # none is due, and after the last step none is of use
            assert not await trials.exchanges.meet(0, step, 0)
        waiting = [trials.meet(number, pack=number % 2) for number in (0, 1, 3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        assert [await task for task in (*waiting, trials.meet(2))] == [False, False, True, False]
        assert trials.handed == [(0, "0003", 0)]
        assert not await trials.meet(3)  # it stands there still; the exchange is over

    asyncio.run(run())
    weak = read_record(trial_folder(sweep, 3))
    assert weak.lineage == ((0, 2),) and weak.values[RATE] == 1e-3 and weak.config.changes[0].after == 2


def test_nobody_waits_for_one_that_is_over_and_all_do_for_one_that_begins_again(population_of: SweepOf) -> None:
    sweep = population_of()
    trials_of(sweep, [5.0, 5.1, 5.2, 5.3])

    async def run() -> None:
        trials = _Trials(sweep, gone=(3,))
        waiting = [trials.meet(0), trials.meet(1)]
        await asyncio.sleep(0.05)
        await trials.exchanges.enter(1)  # its process was lost, and it is at an earlier step now
        waiting.append(trials.meet(2))
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        await trials.exchanges.leave(1)
        assert [await task for task in waiting] == [False, False, True]
        assert trials.handed == [(0, "0002", 0)]

    asyncio.run(run())


def test_a_run_whose_process_was_lost_before_its_row_was_written_meets_the_others_still(
    population_of: SweepOf,
) -> None:
    """Else the others would wait for it after step 2, and it for them after step 4."""
    sweep = population_of()
    (trial,) = trials_of(sweep, [5.0])
    config = trial.config
    job = SimpleNamespace(config=config, checkpoints=CheckpointStore(Path(config.output) / "checkpoints"))
    last = {"step": 2, "loss": 5.0, "eval_loss": 5.0}
    job.checkpoints.save(Checkpoint(2, {}, {}, {UNWRITTEN: [last]}), keep_last=1)
    rows = Path(config.output) / "metrics.jsonl"
    rows.write_text(rows.read_text().splitlines()[0] + "\n")  # that of step 0
    assert _last_row(job, 2) == last
    assert read_record(trial.folder).rows[-1] == last


def test_an_exchange_that_was_cut_short_is_finished_as_it_was_decided(population_of: SweepOf) -> None:
    sweep = population_of(scheduler={"fraction": 0.5})
    trials_of(sweep, [5.0, 5.1, 5.2, 5.3])

    async def run() -> None:
        trials = _Trials(sweep)
        trials.fails = True
        found = await asyncio.gather(*map(trials.meet, range(4)), return_exceptions=True)
        assert all(isinstance(error, OSError) for error in found)  # each trial is tried again
        decided = read_exchange(Path(sweep.output), 2)
        assert decided is not None and len(decided.takeovers) == 2
        begin_record(taken_over(sweep, *(read_record(trial_folder(sweep, n)) for n in (2, decided.takeovers[0].strong)),
                                decided))  # fmt: skip
        again = _Trials(sweep)
        assert [await task for task in [again.meet(number) for number in range(4)]] == [False, False, False, True]
        assert [target for _, target, _ in again.handed] == ["0003"]

    asyncio.run(run())


def test_trials_whose_pack_was_lost_while_they_waited_join_again_before_the_others_exchange(
    population_of: SweepOf,
) -> None:
    sweep = population_of()
    trials_of(sweep, [5.0, 5.1, 5.2, 5.3])

    async def run() -> None:
        trials = _Trials(sweep)
        trials.lost = {0, 2}
        waiting = [trials.meet(number, pack=number % 2) for number in range(4)]
        assert [await asyncio.wait_for(waiting[number], 5) for number in (0, 2)] == [True, True]
        assert trials.handed == [] and not waiting[1].done() and not waiting[3].done()
        assert read_exchange(Path(sweep.output), 2) is None
        trials.lost = set()
        again = [trials.meet(number) for number in (0, 2)]
        assert [await asyncio.wait_for(task, 5) for task in (*again, waiting[1], waiting[3])] == [
            False, False, False, True,
        ]  # fmt: skip
        assert trials.handed == [(0, "0003", 0)]

    asyncio.run(run())


class _Pack:
    """An actor's handle, as far as it is asked who is there."""

    def __init__(self, *here: str, is_starting: bool = False) -> None:
        self._here = here
        self._is_starting = is_starting
        self.present = SimpleNamespace(remote=self._present)

    async def _present(self, names: list[str]) -> list[str]:
        if self._is_starting:
            raise ActorUnavailableError("it is restarting", None)
        return [name for name in names if name in self._here]


def test_a_pack_is_asked_for_its_own_trials_and_has_none_while_it_starts_anew() -> None:
    packs = [_Pack("0", "1", "5"), _Pack(is_starting=True), _Pack()]
    waiting = {0: 0, 1: 0, 2: 0, 3: 1, 4: None}
    assert asyncio.run(find_lost(packs, waiting)) == [2, 3]


def test_a_takeover_is_done_also_where_its_trial_has_taken_over_another_since(population_of: SweepOf) -> None:
    """Else who comes to the earlier step again, from a checkpoint, would wait there for ever."""
    sweep = population_of()
    trials = trials_of(sweep, [5.0, 5.1, 5.2, 5.3])
    output, weak = Path(sweep.output), trials[3]
    for step, strong in ((2, 0), (4, 1)):
        exchange = Exchange(step, {}, [Takeover(3, strong, {}, {RATE: 1.2e-3})])
        write_exchange(output, exchange)
        weak = taken_over(sweep, weak, trials[strong], exchange)
        begin_record(weak)
    assert weak.lineage == ((1, 4),)

    async def run() -> None:
        trials = _Trials(sweep)
        assert not await asyncio.wait_for(trials.exchanges.meet(0, 2, 0), 5)
        assert trials.handed == []

    asyncio.run(run())


def rows_of(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def trained_alone(config: TrainConfig, output: Path) -> list[dict[str, Any]]:
    """The rows of the same configuration, from its beginning."""
    config = config.model_copy(update={"output": str(output), "checkpoints": None})
    runs = PackedRuns(config, pass_tokens=256)
    runs.join("alone", config)
    while runs.go_on("alone") is not None:
        pass
    return rows_of(config)


@pytest.mark.parametrize("is_packed", [True, False], ids=["in_memory", "by_checkpoint"])
def test_the_weak_one_has_the_strong_ones_weights_and_moments_and_goes_on_as_the_changed_run_would(
    population_of: SweepOf, tmp_path: Path, is_packed: bool
) -> None:
    space = {RATE: [1e-2, 3e-3], "method.rank": [2, 3], "optimizer.weight_decay": [0.0, 0.5]}
    sweep = population_of(
        space={**space, "label_smoothing": [0.0, 0.1]}, search={"type": "grid"}, budget={}, tracking={"uri": "none"},
        train={"save_every": 2, "optimizer": {"schedule": "linear"}},
        scheduler={"mutate": [RATE, "optimizer.weight_decay", "label_smoothing"]},
    )  # fmt: skip
    trials = []
    for number, values in enumerate([{RATE: 1e-2, "method.rank": 2}, {RATE: 3e-3, "method.rank": 3, "seed": 5}]):
        record = TrialRecord(
            number, 0, values, trial_folder(sweep, number), trial_config(sweep, values, number=number), 1
        )
        begin_record(record)
        trials.append(record)
    runs = PackedRuns(trials[0].config, pass_tokens=256)
    for trial in trials:
        runs.join(str(trial.number), trial.config)
        for _ in range(3):  # before any step, after 2 steps, after 4
            row = runs.go_on(str(trial.number))
    assert row is not None and row["step"] == 4
    changed = {RATE: 2e-3, "optimizer.weight_decay": 0.5, "label_smoothing": 0.1}
    weak = taken_over(sweep, trials[0], trials[1], Exchange(4, {}, [Takeover(0, 1, {}, changed)]))
    if is_packed:
        runs.hand_over("1", weak.config)
    else:
        hand_over(trials[1].config, weak.config)

    strong = runs._runs["1"].member.optimizer
    stood = CheckpointStore(Path(weak.config.output) / "checkpoints").latest()
    assert stood is not None and stood.step == 4
    told = runs.join("0", weak.config)
    assert told == row and rows_of(weak.config) == rows_of(trials[1].config)
    own = runs._runs["0"].member.optimizer
    for mine, saved, theirs in (
        (own.weights(), stood.weights, strong.weights()), (own.moments(), stood.moments, strong.moments()),
    ):  # fmt: skip
        assert mine.keys() == theirs.keys() == saved.keys()
        assert all(torch.equal(mine[key], theirs[key]) and torch.equal(saved[key], theirs[key]) for key in theirs)
    while runs.go_on("0") is not None:
        pass
    while runs.go_on("1") is not None:  # the strong one notices nothing
        pass
    for config in (weak.config, trials[1].config):
        mine, alone = rows_of(config), trained_alone(config, tmp_path / f"alone-{Path(config.output).name}")
        assert [row["step"] for row in mine] == list(range(9))
        for key in ("loss", "eval_loss", "learning_rate"):
            assert [row.get(key) for row in mine[1:]] == [pytest.approx(row.get(key), abs=1e-5) for row in alone[1:]]
    assert rows_of(weak.config)[5]["learning_rate"] == pytest.approx(
        rows_of(trials[1].config)[5]["learning_rate"] / 1.5
    )
    assert rows_of(weak.config)[8]["eval_loss"] != rows_of(trials[1].config)[8]["eval_loss"]


def test_table_and_page_tell_the_changes_and_the_command_has_them(population_of: SweepOf) -> None:
    sweep = population_of()
    trials = trials_of(sweep, [5.0, 5.1, 5.2, 5.3])
    exchange = Exchange(2, {0: 5.0, 3: 5.3}, [Takeover(3, 0, {RATE: 1e-3}, {RATE: 1.2e-3})])
    write_exchange(Path(sweep.output), exchange)
    begin_record(taken_over(sweep, trials[3], trials[0], exchange))
    end_with(trials[3].folder, [6.0, 5.0, 4.0])
    for trial in trials[:3]:
        (Path(trial.config.output) / "metrics.jsonl").unlink()
        Path(trial.config.output).rmdir()
        end_with(trial.folder, [6.0, 5.0, 4.9])
    results = write_results(sweep, read_records(Path(sweep.output)), ended_by=None)
    assert results.best is not None and results.best.number == 3
    row = pq.read_table(Path(sweep.output) / "results.parquet").to_pylist()[0]
    assert json.loads(row["changes"]) == [{"after": 2, "optimizer": {"learning_rate": 1.2e-3}}]
    assert json.loads(row["lineage"]) == [[0, 2]] and row[RATE] == 1e-3
    page = (Path(sweep.output) / "report.html").read_text()
    assert "after 2: learning_rate 0.0012" in page  # in the ranking
    assert "trial 3 (5.3000) took over trial 0 (5.0000): learning_rate 0.001 → 0.0012" in page
    assert "changes=[{" in page
