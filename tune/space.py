"""From a sweep's space to trials: what each may be, and each as the settings of a training run. Knows no Ray."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.config import TrainConfig, validate
from app.config.sweep import Branch, Choices, Dimension, SweepConfig
from app.errors import UserError
from app.training.fine_tuning import plan_job

TRIALS, RUN = "trials", "run"
MOST_CHECKED = 500
"""Combinations of a grid that are checked as a whole; beyond, each value by itself."""
_DEFAULTS: dict[str, Any] = {
    "workers.count": 1,
    "workers.cpus": 2,
    "workers.threads": 2,
    "samples": 0,
    "keep_last": 1,
    "keep_best": 0,
}

Values = dict[str, Any]
"""A trial's own settings, by dotted key."""


@dataclass(frozen=True)
class Checked:
    """What a space may bring."""

    trials: tuple[TrainConfig, ...]
    """Such as differ in more than how they are optimized."""
    most_steps: int


def grid_of(branch: Branch) -> Iterator[Values]:
    """Every combination; a range counts as its two ends."""
    for combination in itertools.product(*map(_edges, branch.values())):
        yield dict(zip(branch, combination, strict=True))


def num_combinations(branch: Branch) -> int:
    return math.prod(len(_edges(dimension)) for dimension in branch.values())


def trial_folder(config: SweepConfig, number: int) -> Path:
    return Path(config.output) / TRIALS / f"{number:04d}"


def run_folder(trial: Path) -> Path:
    """A run's folder, as `pacos train` makes it."""
    return trial / RUN


def trial_config(config: SweepConfig, values: Mapping[str, Any], *, number: int = 0) -> TrainConfig:
    """The training run of a trial.

    Raises:
        UserError: the settings are none of `pacos train`, or do not go together.
    """
    settings = _nested({**_DEFAULTS, **flattened_values(config.train), **values})
    settings["output"] = str(run_folder(trial_folder(config, number)))
    name = f"{Path(config.output).name}-{number:04d}"
    settings["tracking"] = config.tracking.model_copy(update={"run_name": name}).model_dump()
    return validate(TrainConfig, settings)


def check_space(config: SweepConfig) -> Checked:
    """Refuse a space of which a trial could not start: a key that is none, a rank above the model's width, and so on.

    Raises:
        UserError: naming branch, key and value.
    """
    trials: dict[str, TrainConfig] = {}
    most_steps = 0
    for number, branch in enumerate(config.space):
        where = f"space.{number}: " if len(config.space) > 1 else "space: "
        for values in _checked(branch):
            try:
                trial = trial_config(config, values)
                # What fits does not depend on how it is optimized; planning reads data and model.
                about = trial.model_dump_json(exclude={"optimizer", "seed"})
                if about not in trials:
                    trials[about] = trial
                    most_steps = max(most_steps, plan_job(trial).total_steps)
            except UserError as error:
                raise UserError(f"{where}{error}") from None
    return Checked(tuple(trials.values()), most_steps)


def _checked(branch: Branch) -> Iterator[Values]:
    """Combinations that show what may be wrong: all, or, where they are many, each value beside the others' first."""
    if num_combinations(branch) <= MOST_CHECKED:
        yield from grid_of(branch)
        return
    first = {key: _edges(dimension)[0] for key, dimension in branch.items()}
    for key, dimension in branch.items():
        yield from ({**first, key: value} for value in _edges(dimension))


def _edges(dimension: Dimension) -> tuple[Any, ...]:
    if isinstance(dimension, Choices):
        return dimension.values
    ends = (dimension.low, dimension.high)
    return tuple(map(int, ends)) if dimension.is_whole else ends


def flattened_values(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flattened_values(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as maps; a later key replaces what an earlier one says of the same."""
    made: dict[str, Any] = {}
    for key, value in settings.items():
        *path, name = key.split(".")
        place = made
        for part in path:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[name] = dict(value) if isinstance(value, Mapping) else value
    return made
