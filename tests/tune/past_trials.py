"""Trials as an earlier session left them, without a training run."""

import json
from pathlib import Path
from typing import Any

from app.config import SweepConfig
from tune.records import TrialRecord, begin_record, end_record, note_error, read_record
from tune.space import trial_config, trial_folder


def past_trial(
    sweep: SweepConfig,
    number: int,
    values: dict[str, Any],
    losses: list[float],
    *,
    state: str = "finished",
    **about: Any,
) -> TrialRecord:
    config = trial_config(sweep, values, number=number)
    folder = trial_folder(sweep, number)
    begin_record(TrialRecord(number, about.get("branch", 0), values, folder, config, about.get("weights", 100)))
    return end_with(folder, losses, state=state, error=about.get("error"))


def end_with(folder: Path, losses: list[float], *, state: str = "finished", error: str | None = None) -> TrialRecord:
    """What a trial that was begun has recorded, and how it ended; unless it still runs."""
    rows = [{"step": 2 * place, "eval_loss": loss, "tokens": 10, "step_s": 0.5} for place, loss in enumerate(losses)]
    run = Path(read_record(folder).config.output)
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "eva')
    if state != "running":
        if error is not None:
            note_error(folder, RuntimeError(error))
        end_record(folder, state=state)
    return read_record(folder)
