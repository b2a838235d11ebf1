"""Settings of `pacos sweep`: what is common to all trials, what varies, how it is searched, and when that ends.

Does not know what a trial's settings are called: each trial is validated as a `TrainConfig` where it is made.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, TypeAdapter, model_validator

from app.config.base import Config, LocalPath, Positive, Seed, StorageName
from app.config.tracking import RegisteredName, StoreConfig, TrackingConfig
from app.errors import masked

_RANGES = ("uniform", "log_uniform", "int_uniform", "log_int_uniform")


class Range(Config):
    """Numbers from `low` to `high`, both among them where they are whole."""

    kind: Literal["uniform", "log_uniform", "int_uniform", "log_int_uniform"]
    low: float
    high: float

    @property
    def is_whole(self) -> bool:
        return "int" in self.kind

    @property
    def is_log(self) -> bool:
        return self.kind.startswith("log")

    @model_validator(mode="after")
    def _check(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"{self.kind}=[{self.low:g}, {self.high:g}]: the first must be below the second")
        if self.is_log and self.low <= 0:
            raise ValueError(f"{self.kind}=[{self.low:g}, {self.high:g}]: a logarithm needs numbers above 0")
        if self.is_whole and (self.low % 1 or self.high % 1):
            raise ValueError(f"{self.kind}=[{self.low:g}, {self.high:g}]: must be whole numbers")
        return self


class Choices(Config):
    values: Annotated[tuple[Any, ...], Field(min_length=1)]


Dimension = Choices | Range
Branch = dict[str, Dimension]
"""What varies together: dotted keys of `pacos train`, and what each may be."""


def _branches(space: Any) -> Any:
    """`space` as a list of branches of dotted keys; written as one map, or as a list of maps.

    Raises:
        ValueError: a list is empty, or something is neither a value, a list, nor a range.
    """
    branches = [space] if isinstance(space, Mapping) else space
    if not isinstance(branches, list | tuple) or not branches:
        raise ValueError("give a map of keys to lists or ranges, or a list of such maps")
    for branch in branches:
        if not isinstance(branch, Mapping) or not branch:
            raise ValueError(f"{branch!r} is no map of keys to lists or ranges")
    return tuple(branch if _is_read(branch) else _flattened(branch) for branch in branches)


def _is_read(branch: Mapping[str, Any]) -> bool:
    return all(isinstance(value, Choices | Range) for value in branch.values())


def _flattened(branch: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in branch.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and not set(value) & {*_RANGES, "kind", "values"}:
            found |= _flattened(value, f"{name}.")
        else:
            found[name] = _dimension(name, value)
    return found


def _dimension(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) & {"kind", "values"}:  # as a sweep's own files have it
            return value
        kind, *others = value
        if others or not isinstance(value[kind], list | tuple) or len(value[kind]) != 2:
            raise ValueError(
                f"{name}={dict(value)!r}: a range is one of {', '.join(_RANGES)}, as in log_uniform: [1e-4, 1e-2]"
            )
        return {"kind": kind, "low": value[kind][0], "high": value[kind][1]}
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise ValueError(f"{name}=[]: the list is empty; name what is to be tried")
    return {"values": tuple(map(_number, values))}


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-3 for text, because it has no dot."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)e[+-]?\d+", value, re.IGNORECASE)
    return float(value) if is_number else value


class GridSearchConfig(Config):
    type: Literal["grid"] = "grid"
    """Every combination, branch after branch; ranges have none."""


class RandomSearchConfig(Config):
    type: Literal["random"] = "random"
    seed: Seed = 0


class TpeSearchConfig(Config):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011)."""

    type: Literal["tpe"] = "tpe"
    seed: Seed = 0
    random_trials: Positive = 8
    """Drawn at random before the estimator has anything to go by."""


class NoSchedulerConfig(Config):
    type: Literal["none"] = "none"
    """Every trial runs to its end."""


class AshaConfig(Config):
    """Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934), on the held-out loss per token."""

    type: Literal["asha"] = "asha"
    first_steps: Positive = 50
    """The first rung: no trial is stopped before it has made so many."""
    factor: Annotated[int, Field(ge=2)] = 3
    """One of so many goes on from a rung; the next rung is so many times as far."""


class MedianConfig(Config):
    """Stop a trial whose best loss is worse than the median of the others' means (Golovin et al. 2017, Vizier)."""

    type: Literal["median"] = "median"
    first_steps: Positive = 50
    """No trial is stopped before it has made so many."""
    trials: Positive = 3
    """Other trials that must have come as far."""


MUTABLE = ("optimizer.learning_rate", "optimizer.weight_decay", "label_smoothing")
"""What `train.changes` can change while a run goes."""


class PopulationConfig(Config):
    """Population-based training (Jaderberg et al. 2017, arXiv:1711.09846): all trials go on at once. After each so many
    steps the worst take over the best ones' weights, optimizers and settings, and change some of those."""

    type: Literal["population"] = "population"
    mutate: Annotated[tuple[str, ...], Field(min_length=1)]
    """Keys of the space that change on the way: optimizer.learning_rate, optimizer.weight_decay, label_smoothing. The
    others are drawn once, and taken over as they are."""
    every: Positive = 50
    """Steps from one exchange to the next; a multiple of `train.eval_every`."""
    fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the population that takes over, from as many of the best."""
    factors: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.8, 1.2)
    """A number is multiplied by one of these, within its range; of a list a neighbour is taken."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """How often a key is drawn anew instead."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> "PopulationConfig":
        for key in self.mutate:
            if key not in MUTABLE:
                raise ValueError(
                    f"mutate={key!r} cannot change while a trial trains; those that can are {', '.join(MUTABLE)}. Take "
                    f"{key} out of mutate and leave it in the space: it is then drawn once for each trial, and a trial "
                    "that takes over another has the other's"
                )
        return self


class BudgetConfig(Config):
    """When a sweep ends, whichever comes first. What runs then is stopped, and ranked by what it has reached."""

    trials: Positive | None = None
    """Of the search; the finals come on top."""
    tokens: Positive | None = None
    """Trained on, by all trials together."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Of the clock, counted anew after `--resume`."""
    cost: Annotated[float, Field(gt=0)] | None = None
    """In the currency of `workers.price_per_hour`."""


class FinalsConfig(Config):
    """After the search: the best trials once more with other seeds, each run whole, before a winner is named."""

    trials: Annotated[int, Field(ge=0)] = 3
    """So many of the best finished trials; of several techniques first the best of each. 0: no finals."""
    seeds: Annotated[int, Field(ge=2)] = 3
    """Runs of each. These alone count, not the one that it was chosen for."""


class PromoteBestConfig(Config):
    """`pacos promote --best SWEEP`: the winner of a sweep to production."""

    best: LocalPath
    """A sweep's folder."""
    name: RegisteredName | None = None
    """Under which it is registered; none takes the sweep's `register_as`."""
    alias: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")] = "production"
    tracking: StoreConfig | None = None
    """None takes the sweep's; a URI with a password must be given again, since the sweep's files do not have it."""


def _with_storage(train: dict[str, Any]) -> dict[str, Any]:
    """With a relative `checkpoints` made absolute: trials run in directories of their own."""
    if isinstance(checkpoints := train.get("checkpoints"), str):
        return {**train, "checkpoints": TypeAdapter(StorageName).validate_python(checkpoints)}
    return train


def _masked(value: Any) -> Any:
    """As `Masked`, of all that is in `value`."""
    if isinstance(value, Mapping):
        return {key: _masked(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(inner) for inner in value]
    return masked(value) if isinstance(value, str) else value


class SweepConfig(Config):
    """`pacos sweep`: many training runs, to find the best technique, size and learning rate."""

    output: LocalPath
    """Folder for the sweep: `trials/`, results.parquet, report.html."""
    train: Annotated[dict[str, Any], AfterValidator(_with_storage), PlainSerializer(_masked, when_used="json")]
    """Settings of every trial, those of `pacos train` but `output`. Unless set: one worker of two CPUs and threads, no
    sample answers, and only the newest checkpoint is kept."""
    space: Annotated[tuple[Branch, ...], BeforeValidator(_branches), Field(min_length=1)]
    """What varies: keys of `pacos train` with lists, or ranges as in `{log_uniform: [1e-4, 1e-2]}`; or a list of such
    maps, of which each trial takes one: so a key may be there for one technique alone."""
    search: Annotated[GridSearchConfig | RandomSearchConfig | TpeSearchConfig, Field(discriminator="type")] = (
        TpeSearchConfig()
    )
    scheduler: Annotated[
        NoSchedulerConfig | AshaConfig | MedianConfig | PopulationConfig, Field(discriminator="type")
    ] = AshaConfig()
    """Which trials are stopped early, by their held-out loss each time that they are evaluated; or a population, whose
    worst go on from the best."""
    budget: BudgetConfig = BudgetConfig()
    finals: FinalsConfig = FinalsConfig()
    pack: Literal["auto", "never"] = "auto"
    """`auto` trains those trials over one base in one process that can be: LoRA, adapters, prefixes and prompts with
    one worker; `never` gives each a training run of its own."""
    pack_size: Positive = 8
    """Trials that share a base at once."""
    pass_tokens: Positive = 2048
    """Tokens of a pack that go through the base at once. More need more memory; on a CPU they are no faster, a GPU
    wants tens of thousands."""
    max_retries: Annotated[int, Field(ge=0)] = 1
    """How often a trial that failed is tried again, from its last checkpoint, before it is left."""
    tracking: TrackingConfig = TrackingConfig()
    """The MLflow run of the sweep, and below it one for each trial."""
    register_as: RegisteredName | None = None
    """Name in the model registry for `pacos promote --best`; none takes that of the sweep's folder."""

    @model_validator(mode="after")
    def _check(self) -> "SweepConfig":
        for own in ("output", "tracking", "register_as"):
            if own in self.train:
                raise ValueError(f"train.{own} is the sweep's, not a trial's; set {own} beside train")
        if self.search.type == "grid":
            ranges = [key for branch in self.space for key, of_key in branch.items() if isinstance(of_key, Range)]
            if ranges:
                raise ValueError(f"{ranges[0]} is a range, and a grid needs lists; or take search.type=random or tpe")
        elif not any(value is not None for value in self.budget.model_dump().values()):
            raise ValueError(f"search.type={self.search.type!r} has no end; set budget.trials, or another budget")
        elif self.finals.trials and self.budget.trials is None:
            raise ValueError(
                f"finals.trials={self.finals.trials}: they begin when the search is over, and nothing but the whole "
                "sweep's end ends it; set budget.trials, or finals.trials=0"
            )
        if isinstance(self.scheduler, PopulationConfig):
            self._check_population(self.scheduler)
        return self

    def _check_population(self, scheduler: PopulationConfig) -> None:
        if self.search.type == "tpe":
            raise ValueError(
                "search.type='tpe' learns from trials that are over, and a population begins at once; take "
                "search.type=random or grid"
            )
        if self.search.type == "random" and (self.budget.trials or 0) < 2:
            raise ValueError("budget.trials: how many trials the population has, two at least; set it")
        for key in scheduler.mutate:
            for branch in self.space:
                dimension = branch.get(key)
                if dimension is None or (isinstance(dimension, Choices) and len(dimension.values) < 2):
                    raise ValueError(
                        f"scheduler.mutate={key!r} has nothing to change to; give {key} a range or a list in the space"
                    )
