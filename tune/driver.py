"""Between Ray Tune and a sweep's folder: which trial comes next, how one ended, and when all is to end.

Ray Tune keeps the trials' processes and asks the scheduler; what is remembered stands in the folder (`records.py`). So
a sweep is resumed without Tune's own state: trials that are over are suggested first, report what they recorded, and
leave search and scheduler as they were.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from app.config.sweep import BudgetConfig, SweepConfig
from app.data.shards import read_manifest
from app.training.fine_tuning import count_steps
from app.training.optimizer import trained_parameters
from app.training.pack import why_not_packed
from tune.plan import base_of
from tune.records import State, TrialRecord, begin_record, end_record, read_record, read_records
from tune.search import Search
from tune.space import trial_config, trial_folder

LOOK_EVERY_S = 2.0
Packs = dict[str, list[Any]]
"""Actors by what their trials must have in common (`base_of`)."""


class Watch:
    """The trials' records, read anew when they are older than some seconds."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._read_at = 0.0
        self._records: list[TrialRecord] = []

    def records(self) -> list[TrialRecord]:
        if time.monotonic() - self._read_at > LOOK_EVERY_S:
            self._records, self._read_at = read_records(self._output), time.monotonic()
        return self._records


class _NotKept:
    """Ray Tune pickles what it is given, to restore a sweep from; ours is restored from its folder."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class TrialSource(_NotKept, Searcher):
    """What Ray Tune asks for trials, and tells when one is over."""

    def __init__(
        self,
        config: SweepConfig,
        search: Search | None,
        records: Sequence[TrialRecord],
        *,
        packs: Sequence[Any],
        pack_keys: Sequence[str],
        turnstile: Any,
        exchanges: Any = None,
    ) -> None:
        """`records` are those that have been begun, and `search` names the next; without it there are no others."""
        super().__init__(metric="eval_loss", mode="min")
        self._config = config
        self._packs = packs
        self._pack_keys = pack_keys
        self._turnstile = turnstile
        self._exchanges = exchanges
        self._search = search
        over = [record for record in records if record.state != "running"]
        for record in over:
            self._tell(record)
        self.over_before = {record.number for record in over}
        self._waiting = [record for record in records if record.state != "failed"]
        # Those that are over come first: the scheduler learns of them before it decides on others.
        self._waiting.sort(key=lambda record: record.state == "running")
        self._num_begun = len(records)
        self._next_number = _next_number(config)
        self._folders: dict[str, Path] = {}
        self._pack_of: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        if not self._waiting and (new := self._new_record()) is not None:
            self._waiting.append(new)
        if not self._waiting:
            return Searcher.FINISHED
        record = next(filter(self._has_room, self._waiting), None)
        if record is None:  # Tune asks again
            return None
        self._waiting.remove(record)
        self._folders[trial_id] = record.folder
        pack = self._choose_pack(record)
        if pack is not None:
            self._pack_of[trial_id] = pack
        return {"folder": str(record.folder), "pack": pack}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """It is over: of itself, by the scheduler, or with an error once too often; its place is free."""
        record = read_record(self._folders[trial_id])
        self._release(trial_id, record)
        if record.state == "running":
            is_whole = record.step >= _total_steps(record)
            state: State = "failed" if error else "finished" if is_whole else "stopped"
            end_record(record.folder, state=state)
            self._tell(read_record(record.folder))

    def _tell(self, record: TrialRecord) -> None:
        if self._search is not None:
            self._search.tell(record)

    def _new_record(self) -> TrialRecord | None:
        most, number = self._config.budget.trials, self._next_number
        if self._search is None or (most is not None and self._num_begun >= most):
            return None
        suggestion = self._search.ask(number)
        if suggestion is None:
            return None
        self._next_number, self._num_begun = number + 1, self._num_begun + 1
        branch, values = suggestion
        config = trial_config(self._config, values, number=number)
        record = TrialRecord(
            number, branch, values, trial_folder(self._config, number), config, trained_parameters=count_trained(config)
        )
        begin_record(record)
        return record

    def _has_room(self, record: TrialRecord) -> bool:
        """Whether a pack that it can join is not full; a run of its own waits at the turnstile."""
        pack = self._choose_pack(record)
        return pack is None or Counter(self._pack_of.values())[pack] < self._config.pack_size

    def _choose_pack(self, record: TrialRecord) -> int | None:
        """The emptiest of those that hold its base; None: it is over, or has a run of its own."""
        if record.state != "running" or self._config.pack == "never" or why_not_packed(record.config):
            return None
        key, load = base_of(record.config), Counter(self._pack_of.values())
        return min((n for n, of_pack in enumerate(self._pack_keys) if of_pack == key), key=lambda n: load[n])

    def _release(self, trial_id: str, record: TrialRecord) -> None:
        pack = self._pack_of.pop(trial_id, None)
        if pack is not None:
            self._packs[pack].leave.remote(str(record.number))
        self._turnstile.leave.remote(record.number)
        if self._exchanges is not None:
            self._exchanges.leave.remote(record.number)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the folder has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """As `save`."""


class Ends(_NotKept, Callback):
    """Tells of each trial that is over."""

    def __init__(self, source: TrialSource, on_end: Callable[[TrialRecord], None]) -> None:
        self._source = source
        self._on_end = on_end

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = read_record(Path(trial.config["folder"]))
        if record.number not in self._source.over_before:
            self._on_end(record)

    on_trial_error = on_trial_complete


class Budget(_NotKept, Stopper):
    """Ends all trials once the budget is spent, or when `is_interrupted` says so."""

    def __init__(self, budget: BudgetConfig, watch: Watch, is_interrupted: Callable[[], bool]) -> None:
        self._budget = budget
        self._watch = watch
        self._is_interrupted = is_interrupted
        self._started = time.monotonic()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._is_interrupted() or self.spent() is not None

    def spent(self) -> str | None:
        """Which budget is spent, in words."""
        budget = self._budget
        if budget.hours is not None and time.monotonic() - self._started > 3600 * budget.hours:
            return f"budget.hours={budget.hours:g}"
        if budget.tokens is not None and sum(record.tokens for record in self._watch.records()) >= budget.tokens:
            return f"budget.tokens={budget.tokens:,}"
        if budget.cost is not None and sum(record.cost or 0 for record in self._watch.records()) >= budget.cost:
            return f"budget.cost={budget.cost:g}"
        return None


def _next_number(config: SweepConfig) -> int:
    return max((record.number for record in read_records(Path(config.output))), default=-1) + 1


def count_trained(config: Any) -> int:
    """Weights that a run trains, from the shapes alone."""
    import torch

    from app.assets import model_folder
    from app.methods import apply_method
    from app.models.checkpoints import empty_decoder

    with torch.device("meta"):
        model = empty_decoder(model_folder(config.model))
        apply_method(model, config.method)
    return sum(parameter.numel() for parameter in trained_parameters(model).values())


def _total_steps(record: TrialRecord) -> int:
    """From the data alone: the record's configuration has passwords masked."""
    return count_steps(record.config, read_manifest(record.config.data))


def release_all(packs: Sequence[Any], records: Sequence[TrialRecord]) -> None:
    """Close what trials that were cut short have open, and end the packs."""
    open_runs = [str(record.number) for record in records if record.state == "running"]
    calls = [pack.leave.remote(name) for pack in packs for name in open_runs]
    ray.wait(calls, num_returns=len(calls), timeout=30) if calls else None
    for pack in packs:
        ray.kill(pack)
