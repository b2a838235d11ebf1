"""What is tried next: a grid, draws at random, or Optuna's estimator. Knows no Ray; `trials.py` tells it to Ray Tune.

Each is told what earlier trials came to, also those of an earlier session, from which a resumed sweep goes on.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np

from app.config.sweep import Branch, Choices, Dimension, GridSearchConfig, Range, SweepConfig, TpeSearchConfig
from tune.records import TrialRecord
from tune.space import Values, grid_of

Suggestion = tuple[int, Values]
"""The branch's number, and what it is to be tried with."""


class Search(Protocol):
    def ask(self, number: int) -> Suggestion | None:
        """What trial `number`, the next one, tries; None: there is nothing more to try."""
        ...

    def tell(self, trial: TrialRecord) -> None:
        """A trial that `ask` has named, or one of an earlier session, has ended."""
        ...


def open_search(config: SweepConfig, *, begun: int = 0) -> Search:
    """`begun` is how many trials earlier sessions have begun."""
    if isinstance(config.search, GridSearchConfig):
        return GridSearch(config.space)
    if isinstance(config.search, TpeSearchConfig):
        return TpeSearch(config.space, config.search, begun=begun)
    return RandomSearch(config.space, seed=config.search.seed)


class GridSearch:
    def __init__(self, space: Sequence[Branch]) -> None:
        self._all = [(number, values) for number, branch in enumerate(space) for values in grid_of(branch)]

    def ask(self, number: int) -> Suggestion | None:
        return self._all[number] if number < len(self._all) else None

    def tell(self, trial: TrialRecord) -> None:
        pass


class RandomSearch:
    """A trial's draw follows from seed and number alone."""

    def __init__(self, space: Sequence[Branch], *, seed: int) -> None:
        self._space = space
        self._seed = seed

    def ask(self, number: int) -> Suggestion:
        draw = np.random.default_rng((self._seed, number))
        branch = int(draw.integers(len(self._space)))
        return branch, {key: drawn(dimension, draw) for key, dimension in self._space[branch].items()}

    def tell(self, trial: TrialRecord) -> None:
        pass


def drawn(dimension: Dimension, draw: np.random.Generator) -> Any:
    """A value of `dimension`, each as likely as any."""
    if isinstance(dimension, Choices):
        return dimension.values[int(draw.integers(len(dimension.values)))]
    low, high = dimension.low, dimension.high
    if dimension.is_whole and not dimension.is_log:
        return int(draw.integers(int(low), int(high) + 1))
    if dimension.is_whole:  # each whole number has the part of the line that rounds to it
        low, high = low - 0.5, high + 0.5
    value = math.exp(draw.uniform(math.log(low), math.log(high))) if dimension.is_log else draw.uniform(low, high)
    return min(max(round(value), int(dimension.low)), int(dimension.high)) if dimension.is_whole else value


class TpeSearch:
    """Optuna's, by `ask` and `tell`. A branch's keys are parameters of their own, so that each technique learns from
    its own trials."""

    def __init__(self, space: Sequence[Branch], config: TpeSearchConfig, *, begun: int = 0) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        # Trials that are told alone draw nothing: with the first session's seed a later one would draw the same again.
        seed = int(np.random.SeedSequence((config.seed, begun)).generate_state(1)[0]) if begun else config.seed
        sampler = optuna.samplers.TPESampler(n_startup_trials=config.random_trials, constant_liar=True, seed=seed)
        self.study = optuna.create_study(direction="minimize", sampler=sampler)
        self._running: dict[int, Any] = {}

    def ask(self, number: int) -> Suggestion:
        trial = self._running[number] = self.study.ask()
        branch = trial.suggest_categorical("branch", range(len(self._space)))
        values = {key: _suggested(trial, f"{branch}/{key}", of_key) for key, of_key in self._space[branch].items()}
        return branch, values

    def tell(self, trial: TrialRecord) -> None:
        from optuna.trial import TrialState

        if trial.number not in self._running:
            self.study.enqueue_trial(self._params(trial))
            self.ask(trial.number)
        asked = self._running.pop(trial.number)
        for row in trial.evaluations:
            asked.report(row["eval_loss"], row["step"])
        if trial.state == "finished" and trial.loss is not None:
            self.study.tell(asked, trial.loss)
        else:  # of one that was stopped the estimator knows how far it came
            is_stopped = trial.state == "stopped" and trial.evaluations
            self.study.tell(asked, state=TrialState.PRUNED if is_stopped else TrialState.FAIL)

    def _params(self, trial: TrialRecord) -> dict[str, Any]:
        branch = self._space[trial.branch]
        own = {f"{trial.branch}/{key}": _place(branch[key], value) for key, value in trial.values.items()}
        return {"branch": trial.branch, **own}


def _suggested(trial: Any, name: str, dimension: Dimension) -> Any:
    if isinstance(dimension, Range):
        suggest = trial.suggest_int if dimension.is_whole else trial.suggest_float
        return suggest(name, *_ends(dimension), log=dimension.is_log)
    places = len(dimension.values)
    if _is_ordered(dimension):
        return dimension.values[trial.suggest_int(name, 0, places - 1)]
    return dimension.values[trial.suggest_categorical(name, range(places))]


def _ends(dimension: Range) -> tuple[float, float]:
    return (int(dimension.low), int(dimension.high)) if dimension.is_whole else (dimension.low, dimension.high)


def _is_ordered(dimension: Choices) -> bool:
    """Numbers that rise: what holds for one says something of its neighbours."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in dimension.values):
        return False
    return all(before < after for before, after in itertools.pairwise(cast(tuple[float, ...], dimension.values)))


def _place(dimension: Dimension, value: Any) -> Any:
    return value if isinstance(dimension, Range) else _as_list(dimension.values).index(_plain(value))


def _as_list(values: Sequence[Any]) -> list[Any]:
    return list(map(_plain, values))


def _plain(value: Any) -> Any:
    """Lists and tuples alike: JSON knows the former alone."""
    return list(value) if isinstance(value, list | tuple) else value
