"""From a sweep's space to trials: what each may be, and each as the settings of a training run. Knows no Ray."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.config import TrainConfig, validate
from app.config.schema import ChangeConfig
from app.config.sweep import Branch, Choices, Dimension, SweepConfig
from app.errors import UserError

TRIALS, RUN = "trials", "run"
MOST_CHECKED = 500
"""Combinations of a grid that are checked as a whole; beyond, those of `_decides`, and each other value by itself."""
_OF_BASE = {"model", "precision", "workers"}
_OF_PACKING = {"method", "method.type", "method.dropout", "attention", "gradient_checkpointing", "compile", "samples"}
_OF_LENGTH = {"data", "epochs", "max_steps", "batch_size"}
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
    least_steps: int
    most_steps: int


def grid_of(branch: Branch) -> Iterator[Values]:
    """Every combination; a range counts as its two ends."""
    for combination in itertools.product(*map(_edges, branch.values())):
        yield dict(zip(branch, combination, strict=True))


def num_combinations(branch: Branch) -> int:
    return math.prod(len(_edges(dimension)) for dimension in branch.values())


def trial_folder(config: SweepConfig, number: int) -> Path:
    return Path(config.output) / TRIALS / f"{number:04d}"


def place_of(config: SweepConfig, number: int, *, since: int | None = None) -> dict[str, Any]:
    """Settings of where trial `number`'s run lies and is recorded; one that takes over another after the step `since`
    goes on in places of its own."""
    run = RUN if since is None else f"{RUN}-from-{since}"
    name = f"{Path(config.output).name}-{number:04d}{run.removeprefix(RUN)}"
    place: dict[str, Any] = {
        "output": str(trial_folder(config, number) / run),
        "tracking": config.tracking.model_copy(update={"run_name": name}),
    }
    if (checkpoints := config.train.get("checkpoints")) is not None:
        place["checkpoints"] = _below(checkpoints, place["output"])
    return place


def with_secrets(config: TrainConfig, *, tracking_uri: str, checkpoints: str | None) -> TrainConfig:
    """A trial's configuration as it was written down, which has passwords masked, with those of `train.checkpoints` and
    of the tracking's URI."""
    update: dict[str, Any] = {"tracking": config.tracking.model_copy(update={"uri": tracking_uri})}
    if checkpoints is not None:
        update["checkpoints"] = _below(checkpoints, config.output)
    return config.model_copy(update=update)


def _below(place: str, output: str) -> str:
    """A folder of `place`, a folder or URI that all trials have, for the run in `output` alone."""
    path, query, options = place.partition("?")
    return "/".join((path.rstrip("/"), *Path(output).parts[-2:])) + query + options


def trial_config(
    config: SweepConfig, values: Mapping[str, Any], *, number: int = 0, changes: Sequence[ChangeConfig] = ()
) -> TrainConfig:
    """The training run of a trial; `changes` are those that exchanges have found.

    Raises:
        UserError: the settings are none of `pacos train`, or do not go together.
    """
    settings = nested({**_DEFAULTS, **flattened_values(config.train), **values}) | place_of(config, number)
    if changes:
        settings["changes"] = [change.model_dump() for change in changes]
    return validate(TrainConfig, settings | {"tracking": settings["tracking"].model_dump()})


def check_space(config: SweepConfig) -> Checked:
    """Refuse a space of which a trial could not start: a key that is none, a rank above the model's width, and so on.

    Raises:
        UserError: naming branch, key and value.
    """
    from app.training.fine_tuning import plan_job  # with torch, which trials in packs and exchanges do without

    trials: dict[str, TrainConfig] = {}
    steps: set[int] = set()
    for number, branch in enumerate(config.space):
        where = f"space.{number}: " if len(config.space) > 1 else "space: "
        try:
            _check_apart(branch, config.train)
            for values in _checked(branch):
                trial = trial_config(config, values)
                # What fits does not depend on how it is optimized; planning reads data and model.
                about = trial.model_dump_json(exclude={"optimizer", "seed"})
                if about not in trials:
                    trials[about] = trial
                    job = plan_job(trial)
                    steps.add(job.total_steps)
                    if not job.manifest.num_rows("validation"):
                        raise UserError(
                            f"train.data={trial.data!r} has no held-out records, by whose loss trials are compared; "
                            "prepare it with a larger validation_fraction"
                        )
        except UserError as error:
            raise UserError(f"{where}{error}") from None
    return Checked(tuple(trials.values()), min(steps), max(steps))


def _check_apart(branch: Branch, train: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: a key holds another, and so one would replace the other.
    """
    names = {key: f"train.{key}" for key in flattened_values(train)} | {key: key for key in branch}
    for whole, part in itertools.permutations(names, 2):
        if part.startswith(f"{whole}."):
            raise UserError(
                f"{names[part]} is a part of {names[whole]}, and one of them would replace the other; say all of "
                f"{whole} in one of them"
            )


def _checked(branch: Branch) -> Iterator[Values]:
    """Combinations that show what may be wrong: all, or, where they are many, those of the keys that decide what a
    sweep has ready, and each other value beside the others' first."""
    if num_combinations(branch) <= MOST_CHECKED:
        yield from grid_of(branch)
        return
    first = {key: _edges(dimension)[0] for key, dimension in branch.items()}
    decisive = {key: dimension for key, dimension in branch.items() if _decides(key)}
    yield from ({**first, **values} for values in grid_of(decisive))
    for key in branch:
        if key not in decisive:
            yield from ({**first, key: value} for value in _edges(branch[key]))


def _decides(key: str) -> bool:
    """Whether a trial's base, its place in a pack, or its number of steps follow from `key`."""
    return key.partition(".")[0] in _OF_BASE or key in _OF_PACKING | _OF_LENGTH


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


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
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
