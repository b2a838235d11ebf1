"""A run's folder: opened or reopened at its start, metrics.jsonl while it goes, loss.png at its end."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from app.atomic import replaced_file, write_text
from app.config.base import Config
from app.errors import UserError
from app.run_lock import LOCK_FILE
from app.training.checkpoint_store import CheckpointStore
from app.training.loop import Metrics

_CONFIG, _INPUTS = "config.json", "inputs.sha256"
_MAY_CHANGE = {
    "workers",
    "deepspeed",
    "max_failures",
    "checkpoints",
    "keep_last",
    "keep_best",
    "output",
    "micro_batch_size",
    "gradient_checkpointing",
    "attention",
    "compile",
    "tracking",
    "register_as",
}
"""Settings that a resumed run may change: how it is spread over the cluster, its memory, and where it is recorded; not
what it computes."""


def open_run(config: Config, *, inputs: str, checkpoints: CheckpointStore, resume: bool) -> int:
    """Create `config.output` for a new run, or check that it holds this run; returns the step to go on from.

    `inputs` is a hash of what the run reads: a path may be the same when what lies there is not.

    Raises:
        UserError: the folder or `checkpoints` holds a run and `resume` is false; or true, and it holds none, or
            another one; or one of them cannot be reached.
    """
    resolved = config.model_dump(mode="json")
    output = Path(resolved["output"])
    stored, stored_inputs = output / _CONFIG, output / _INPUTS
    if resume:
        if not stored.exists():
            raise UserError(f"output={str(output)!r} holds no run to resume; leave --resume out to start one")
        before = _stored_settings(type(config), stored)
        _refuse_changes(before, resolved)
        if stored_inputs.read_text().strip() != inputs:
            raise UserError(
                f"the data or the model that the run in {str(output)!r} reads has changed since it was started"
            )
        step = checkpoints.latest_step()
        if not step and before.get("checkpoints") != resolved.get("checkpoints"):
            raise UserError(
                f"checkpoints={checkpoints.place!r} holds no checkpoint; the run's were elsewhere, move them"
            )
        return step
    check_is_new(output)
    if step := checkpoints.latest_step():
        raise UserError(
            f"checkpoints={checkpoints.place!r} holds step {step} of another run; name a place for this one alone"
        )
    begin_folder(config, inputs=inputs)
    return 0


def begin_folder(config: Config, *, inputs: str) -> None:
    """Write down what `config.output` is the run of."""
    resolved = config.model_dump(mode="json")
    output = Path(resolved["output"])
    write_text(output / _INPUTS, inputs + "\n")
    write_text(output / _CONFIG, json.dumps(resolved, indent=2) + "\n")


def check_is_new(output: Path) -> None:
    """
    Raises:
        UserError: `output` holds something.
    """
    if not output.exists():
        return
    begun = {LOCK_FILE, _INPUTS}  # before there is a configuration, there is no run that could go on
    if not output.is_dir() or any(
        entry.name not in begun and not (entry.name.startswith(".") and entry.name.endswith(".tmp"))
        for entry in output.iterdir()
    ):
        raise UserError(f"output={str(output)!r} is not empty; pass --resume to go on, or name another folder")


def _stored_settings(kind: type[Config], file: Path) -> dict[str, Any]:
    """Read as a configuration, so that a setting that came later counts at its default."""
    try:
        return kind.model_validate(json.loads(file.read_text())).model_dump(mode="json")
    except ValueError as error:
        raise UserError(
            f"{str(file)!r} cannot be read ({error}); was the run started by another version? Start it anew"
        ) from None


def _refuse_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    for key in sorted((before.keys() | now.keys()) - _MAY_CHANGE):
        if before.get(key) != now.get(key):
            raise UserError(f"{key}: the run was started with {before.get(key)!r}, not {now.get(key)!r}; keep it")


class RunLog:
    """Metrics by step, one JSON line each. A step that comes again, after a resume, replaces what followed it.

    They are in the file alone: a run may have millions of steps.
    """

    def __init__(self, folder: Path, *, start_step: int) -> None:
        self._file = folder / "metrics.jsonl"
        self._last_step = -1
        self._keep_until(start_step if start_step and self._file.exists() else -1)

    @property
    def rows(self) -> list[Metrics]:
        lines = self._file.read_text(encoding="utf-8").splitlines()
        return [row for row in map(_parse, lines) if row]

    def add(self, metrics: Metrics) -> None:
        """
        Raises:
            UserError: the file cannot be written.
        """
        if metrics["step"] <= self._last_step:
            self._keep_until(metrics["step"] - 1)
        self._last_step = metrics["step"]
        try:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise UserError(f"{str(self._file)!r} cannot be written: {error.strerror}") from None

    def recover(self, rows: Iterable[Metrics]) -> list[Metrics]:
        """Add those of `rows` that follow what there is, and return them: a driver that was killed had yet to."""
        missing = [row for row in rows if row["step"] > self._last_step]
        for row in missing:
            self.add(row)
        return missing

    def plot(self, file: Path, *, title: str) -> None:
        """Training and held-out loss by step, as a PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        rows = self.rows
        train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        if train:
            axes.plot(*zip(*train, strict=True), color="0.7", linewidth=0.8, label="training batch")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), marker="o", color="tab:blue", label="held-out records")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        with replaced_file(file) as staging:
            figure.savefig(staging, dpi=130, format="png")
        pyplot.close(figure)

    def _keep_until(self, step: int) -> None:
        rows = [row for row in self.rows if row["step"] <= step] if step >= 0 else []
        self._last_step = rows[-1]["step"] if rows else -1
        write_text(self._file, "".join(json.dumps(row) + "\n" for row in rows))


def last(rows: Sequence[Metrics], key: str) -> Any:
    """The newest value of `key`."""
    return first(reversed(rows), key)


def first(rows: Iterable[Metrics], key: str) -> Any:
    return next((row[key] for row in rows if key in row), None)


def _parse(line: str) -> Metrics | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the last line of a killed run
        return None
