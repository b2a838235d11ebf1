"""What a Ray Tune trial runs: it has a run trained, and reports each evaluation, whereupon Tune may end it.

A trial of an earlier session that is over is not trained again: what it recorded is reported once more, so that the
scheduler knows what it knew. Imports little, because each trial is a process of its own.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from app.config.schema import TrainConfig
from tune.records import TrialRecord, note_error, read_record

RESTARTED_WITHIN_S = 60.0


def run_trial(
    settings: dict[str, Any], *, packs: list[Any], turnstile: Any, tracking_uri: str, parent: str | None
) -> None:
    """`settings` are what `TrialSource` suggested: the trial's folder, and the pack that it is for."""
    record = read_record(Path(settings["folder"]))
    # Not the file's, which has passwords masked.
    tracking = record.config.tracking.model_copy(update={"uri": tracking_uri})
    config = record.config.model_copy(update={"tracking": tracking})
    try:
        _run(settings, record, config, packs=packs, turnstile=turnstile, parent=parent)
    except Exception as error:
        note_error(record.folder, error)
        raise


def _run(
    settings: dict[str, Any],
    record: TrialRecord,
    config: TrainConfig,
    *,
    packs: list[Any],
    turnstile: Any,
    parent: str | None,
) -> None:
    if record.state != "running":
        for row in record.rows:
            if "eval_loss" in row:
                report(row)
    elif settings["pack"] is not None:
        _train_in_pack(config, packs[settings["pack"]], name=str(record.number))
    else:
        _train_alone(config, turnstile, number=record.number, parent=parent)


def report(row: dict[str, Any]) -> None:
    """An evaluation, to Ray Tune; returns when the trial may go on."""
    from ray import tune

    tune.report({key: row[key] for key in ("step", "loss", "eval_loss", "eval_tokens") if key in row})


def _train_in_pack(config: TrainConfig, pack: Any, *, name: str) -> None:
    _answer_of(lambda: pack.join.remote(name, config))
    while (row := ray.get(pack.go_on.remote(name))) is not None:
        report(row)
    ray.get(pack.leave.remote(name))


def _answer_of(call: Callable[[], Any]) -> Any:
    """Of a pack whose process may just be starting anew."""
    deadline = time.monotonic() + RESTARTED_WITHIN_S
    while True:
        try:
            return ray.get(call())
        except ActorUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def _train_alone(config: TrainConfig, turnstile: Any, *, number: int, parent: str | None) -> None:
    """A Ray Train run. Its last evaluation is reported once its result is written."""
    from app.training.fine_tuning import fine_tune, plan_job

    job = plan_job(config)
    last: list[dict[str, Any]] = []

    def on_metrics(row: dict[str, Any]) -> None:
        if row["step"] == job.total_steps:
            last.append(row)
        elif "eval_loss" in row:
            report(row)

    ray.get(turnstile.enter.remote(number))
    try:
        is_begun = (Path(config.output) / "config.json").exists()
        fine_tune(job, resume=is_begun, on_metrics=on_metrics, parent=parent)
    finally:
        ray.get(turnstile.leave.remote(number))
    for row in last[-1:]:
        report(row)
