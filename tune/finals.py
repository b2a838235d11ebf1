"""The best of a search once more, with other seeds: which, their records, and what they come to. Knows no Ray.

A search takes the lowest of many losses, and the lowest is partly luck. So a finalist is judged by new seeds alone, not
by the run that it was chosen for.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from app.config.sweep import SweepConfig
from tune.records import TrialRecord, begin_record
from tune.space import trial_config, trial_folder

_OWN = {"seed", "output", "checkpoints", "tracking"}
"""Settings in which trials may differ and yet try the same."""


@dataclass(frozen=True)
class Finalist:
    """A trial of the search, whose runs with other seeds have all finished."""

    trial: TrialRecord
    runs: Sequence[TrialRecord]
    """By rising loss."""

    @property
    def mean(self) -> float:
        return statistics.fmean(_loss(run) for run in self.runs)

    @property
    def deviation(self) -> float:
        """Standard deviation of a sample: n - 1 below the sum."""
        return statistics.stdev(_loss(run) for run in self.runs)

    @property
    def run(self) -> TrialRecord:
        """The median, of an even number the lower one: the best would again be chosen by luck."""
        return self.runs[(len(self.runs) - 1) // 2]


def finalists_of(trials: Sequence[TrialRecord]) -> list[Finalist]:
    """By rising mean. One of whose runs another is not over, or failed, is none."""
    found = []
    for trial in trials:
        runs = [run for run in trials if run.repeats == trial.number]
        if len(runs) > 1 and all(run.state == "finished" and run.loss is not None for run in runs):
            found.append(Finalist(trial, sorted(runs, key=_loss)))
    return sorted(found, key=lambda finalist: finalist.mean)


def choose_finalists(ranking: Sequence[TrialRecord], count: int) -> list[TrialRecord]:
    """The best finished trials of a search; of several techniques first the best of each. `ranking` has the best first.

    Of trials that differ in nothing but the seed, the best alone.
    """
    distinct: dict[str, TrialRecord] = {}
    for trial in ranking:
        if trial.state == "finished" and trial.loss is not None:
            distinct.setdefault(trial.config.model_dump_json(exclude=_OWN), trial)
    best_of_each: dict[str, TrialRecord] = {}
    for trial in distinct.values():
        best_of_each.setdefault(trial.method, trial)
    first = list(best_of_each.values())
    return [*first, *(trial for trial in distinct.values() if trial not in first)][:count]


def begin_finals(config: SweepConfig, trials: Sequence[TrialRecord], finalists: Sequence[TrialRecord]) -> None:
    """Write down the runs of `finalists` with other seeds, but for those that `trials`, all of the sweep, has."""
    begun = {(trial.repeats, trial.config.seed) for trial in trials}
    number = max((trial.number for trial in trials), default=-1)
    for finalist in finalists:
        for place in range(1, config.finals.seeds + 1):
            seed = (finalist.config.seed + place) % 2**32
            if (finalist.number, seed) in begun:
                continue
            number += 1
            values = {**finalist.values, "seed": seed}
            begin_record(
                TrialRecord(
                    number,
                    finalist.branch,
                    values,
                    trial_folder(config, number),
                    trial_config(config, values, number=number, changes=finalist.config.changes),
                    trained_parameters=finalist.trained_parameters,
                    repeats=finalist.number,
                )
            )


def _loss(run: TrialRecord) -> float:
    assert run.loss is not None
    return run.loss
