"""Population-based training (Jaderberg et al. 2017, arXiv:1711.09846): who takes over from whom, and what changes then.

After each `every` steps all trials wait for each other. Then the worst become what the best are, to the last bit, but
for settings that they change. Such a change stands in the trial's configuration (`changes`), which so says at any time
what has made the trial, and makes it again.

OUTPUT/exchanges/00000050.json    what was decided after step 50, written before it is done

Knows no Ray.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.atomic import write_text
from app.config.schema import ChangeConfig, TrainConfig
from app.config.sweep import Choices, Dimension, PopulationConfig, SweepConfig
from tune.records import TrialRecord
from tune.search import drawn
from tune.space import Values, nested, place_of

EXCHANGES = "exchanges"


@dataclass(frozen=True)
class Takeover:
    weak: int
    strong: int
    before: Values
    """What the strong one trains with of the keys that may change."""
    after: Values
    """What the weak one goes on with."""


@dataclass(frozen=True)
class Exchange:
    step: int
    losses: Mapping[int, float]
    """Of all that were there."""
    takeovers: Sequence[Takeover]


def decide(config: SweepConfig, trials: Iterable[TrialRecord], *, step: int) -> Exchange:
    """What the population `trials` exchanges after `step`; it follows from their losses there and the seed alone."""
    scheduler, by_number = _scheduler(config), {trial.number: trial for trial in trials}
    losses = {number: loss_at(trial, step) for number, trial in by_number.items()}
    order = sorted(losses, key=lambda number: (losses[number], number))
    count = min(max(1, int(len(order) * scheduler.fraction)), len(order) // 2)
    draw = np.random.default_rng((scheduler.seed, step))
    takeovers = []
    for weak in order[len(order) - count :]:
        strong = order[int(draw.integers(count))]
        if losses[weak] > losses[strong]:
            before = {key: value_of(by_number[strong].config, key, after=step) for key in scheduler.mutate}
            branch = config.space[by_number[strong].branch]
            after = {key: _mutated(branch[key], before[key], scheduler, draw) for key in scheduler.mutate}
            takeovers.append(Takeover(weak, strong, before, after))
    return Exchange(step, losses, tuple(takeovers))


def loss_at(trial: TrialRecord, step: int) -> float:
    """Held-out, after `step`; infinite where it is no number, or there is none."""
    found = [row["eval_loss"] for row in trial.rows if row["step"] == step and "eval_loss" in row]
    return found[-1] if found and math.isfinite(found[-1]) else math.inf


def value_of(config: TrainConfig, key: str, *, after: int) -> float:
    """What `key` is from step `after` on."""
    settings = config.model_dump()
    places = [settings, *(change.model_dump() for change in config.changes if change.after <= after)]
    values = [value for place in places if (value := _within(place, key)) is not None]
    return values[-1]


def taken_over(config: SweepConfig, weak: TrialRecord, strong: TrialRecord, exchange: Exchange) -> TrialRecord:
    """`weak` as what `strong` is, with the changes of the exchange, and a folder for the run that now begins."""
    step = exchange.step
    (takeover,) = [each for each in exchange.takeovers if each.weak == weak.number]
    change = ChangeConfig.model_validate({"after": step, **nested(takeover.after)})
    settings = {**strong.config.model_dump(), "changes": (*strong.config.changes, change)}
    return replace(
        weak,
        branch=strong.branch,
        values=strong.values,
        trained_parameters=strong.trained_parameters,
        config=TrainConfig.model_validate({**settings, **place_of(config, weak.number, since=step)}),
        lineage=(*strong.lineage, (strong.number, step)),
    )


def write_exchange(sweep: Path, exchange: Exchange) -> None:
    write_text(_file(sweep, exchange.step), json.dumps(asdict(exchange), indent=2) + "\n")


def read_exchange(sweep: Path, step: int) -> Exchange | None:
    file = _file(sweep, step)
    return _read(file) if file.exists() else None


def read_exchanges(sweep: Path) -> list[Exchange]:
    """In the order of their steps."""
    return [_read(file) for file in sorted((sweep / EXCHANGES).glob("*.json"))]


def _file(sweep: Path, step: int) -> Path:
    return sweep / EXCHANGES / f"{step:08d}.json"


def _read(file: Path) -> Exchange:
    about = json.loads(file.read_text())
    losses = {int(number): loss for number, loss in about["losses"].items()}
    return Exchange(about["step"], losses, tuple(Takeover(**each) for each in about["takeovers"]))


def _mutated(dimension: Dimension, value: float, scheduler: PopulationConfig, draw: np.random.Generator) -> Any:
    """Another value near `value`, or one drawn anew."""
    if draw.random() < scheduler.resample:
        return drawn(dimension, draw)
    if isinstance(dimension, Choices):
        place = list(dimension.values).index(value) + (-1, 1)[int(draw.integers(2))]
        return dimension.values[min(max(place, 0), len(dimension.values) - 1)]
    factor = scheduler.factors[int(draw.integers(len(scheduler.factors)))]
    return min(max(value * factor, dimension.low), dimension.high)


def _within(settings: Mapping[str, Any], key: str) -> Any:
    """What a dotted key leads to; None where it leads nowhere."""
    place: Any = settings
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def _scheduler(config: SweepConfig) -> PopulationConfig:
    assert isinstance(config.scheduler, PopulationConfig)
    return config.scheduler
