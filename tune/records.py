"""What a sweep's folder says of its trials: the one truth of how far a sweep is, also for one that is resumed.

OUTPUT/sweep.json                the resolved settings
OUTPUT/trials/0007/trial.json    what the trial tries, written before it starts
OUTPUT/trials/0007/ended.json    how it ended, written by the driver; without it the trial is not over
OUTPUT/trials/0007/error.txt     what its last try failed of, if one did: a line, and below it the traceback
OUTPUT/trials/0007/run/          the run's folder, as `pacos train` makes it

Knows no Ray.
"""

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.atomic import write_text
from app.config.methods import name_of, parts_of
from app.config.schema import TrainConfig
from app.errors import masked
from tune.space import flattened_values

TRIAL_FILE, ENDED_FILE, ERROR_FILE, METRICS_FILE = "trial.json", "ended.json", "error.txt", "metrics.jsonl"
State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrialRecord:
    number: int
    branch: int
    values: Mapping[str, Any]
    folder: Path
    """OUTPUT/trials/NUMBER; the run's is that of `config.output`."""
    config: TrainConfig
    trained_parameters: int
    repeats: int | None = None
    """The trial of the search that this one, in the finals, trains again with another seed."""
    lineage: Sequence[tuple[int, int]] = ()
    """Of a population: the trials that this one took over, directly or with what it took over, and after which step."""
    state: State = "running"
    """finished: it made all of its steps; stopped: by the scheduler, or as the sweep ended."""
    error: str | None = None
    rows: Sequence[dict[str, Any]] = field(default=(), repr=False)
    """Of metrics.jsonl."""
    cost: float | None = None

    @property
    def values_now(self) -> Mapping[str, Any]:
        """`values`, with what has changed since."""
        changes = (flattened_values(change.model_dump()) for change in self.config.changes)
        return {**self.values, **{key: value for change in changes for key, value in change.items() if key != "after"}}

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """From the first step on; the loss before training is the base's."""
        return [row for row in self.rows if "eval_loss" in row and row["step"]]

    @property
    def loss(self) -> float | None:
        """The last held-out loss: what its delta would have."""
        evaluations = self.evaluations
        return evaluations[-1]["eval_loss"] if evaluations else None

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def tokens(self) -> int:
        return sum(row.get("tokens", 0) for row in self.rows)

    @property
    def seconds(self) -> float:
        """Of its steps; in a pack its share of theirs."""
        return sum(row.get("step_s", 0.0) for row in self.rows)

    @property
    def method(self) -> str:
        return name_of(self.config.method)

    @property
    def techniques(self) -> tuple[str, ...]:
        return tuple(part.type for part in parts_of(self.config.method))


def begin_record(record: TrialRecord) -> None:
    """Write down what a trial is about to try, or goes on with."""
    about = {
        "number": record.number,
        "branch": record.branch,
        "values": record.values,
        "repeats": record.repeats,
        "lineage": record.lineage,
        "trained_parameters": record.trained_parameters,
        "config": record.config.model_dump(mode="json"),
    }
    write_text(record.folder / TRIAL_FILE, json.dumps(about, indent=2) + "\n")


def note_error(folder: Path, error: BaseException) -> None:
    """Keep the innermost cause in a line, for Ray wraps what was raised, more than once; and below it the traceback."""
    whole = "".join(traceback.format_exception(error))
    while isinstance(inner := getattr(error, "cause", None) or error.__cause__, BaseException):
        error = inner
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    line = masked(f"{type(error).__name__}: {lines[-1] if lines else ''}")[:500]
    write_text(folder / ERROR_FILE, f"{line}\n\n{masked(whole)}")


def end_record(folder: Path, *, state: State) -> None:
    """Write down how a trial ended; the first word counts."""
    if not (folder / ENDED_FILE).exists():
        noted, error = folder / ERROR_FILE, None
        if state == "failed":
            error = _first_line(noted) if noted.exists() else "the trial's process was lost"
        write_text(folder / ENDED_FILE, json.dumps({"state": state, "error": error}, indent=2) + "\n")


def _first_line(file: Path) -> str:
    return file.read_text(encoding="utf-8").partition("\n")[0].strip()


def read_records(sweep: Path) -> list[TrialRecord]:
    """All trials that have been begun, by number."""
    return list(_records(sweep))


def _records(sweep: Path) -> Iterator[TrialRecord]:
    for file in sorted(sweep.glob(f"trials/*/{TRIAL_FILE}")):
        yield read_record(file.parent)


def read_record(folder: Path) -> TrialRecord:
    about = json.loads((folder / TRIAL_FILE).read_text())
    ended = _json(folder / ENDED_FILE) or {"state": "running", "error": None}
    config = TrainConfig.model_validate(about["config"])
    return TrialRecord(
        number=about["number"],
        branch=about["branch"],
        values=about["values"],
        folder=folder,
        config=config,
        trained_parameters=about["trained_parameters"],
        repeats=about.get("repeats"),
        lineage=tuple(map(tuple, about.get("lineage", ()))),
        state=ended["state"],
        error=ended["error"],
        rows=read_rows(Path(config.output)),
        cost=_cost(folder),
    )


def read_rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / METRICS_FILE
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # it is being written
            break
    return rows


def _cost(trial: Path) -> float | None:
    """Of all that its runs held, also of one that it gave up for another's."""
    sessions = [
        session for file in sorted(trial.glob("*/worker_hours.json")) for session in json.loads(file.read_text())
    ]
    if not sessions or any(session["price_per_hour"] is None for session in sessions):
        return None
    return sum(session["worker_hours"] * session["price_per_hour"] for session in sessions)


def _json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None
