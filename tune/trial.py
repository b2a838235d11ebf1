"""What a Ray Tune trial runs: it has a run trained, and reports each evaluation, whereupon Tune may end it.

A trial of an earlier session that is over is not trained again: what it recorded is reported once more, so that the
scheduler knows what it knew. Imports little, because each trial is a process of its own.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from app.config.schema import TrainConfig
from tune.records import note_error, read_record

RESTARTED_WITHIN_S = 60.0

Current = Callable[[], TrainConfig]
"""What the trial trains; another thing after a takeover."""
Meet = Callable[[dict[str, Any] | None], bool]
"""Takes the trial's last row, waits where there is an exchange after it, and says whether its run begins anew."""


def run_trial(
    settings: dict[str, Any],
    *,
    packs: list[Any],
    turnstile: Any,
    with_secrets: Callable[[TrainConfig], TrainConfig],
    parent: str | None,
    exchanges: Any = None,
    exchange_every: int | None = None,
) -> None:
    """`settings` are what `TrialSource` suggested: the trial's folder, and the pack that it is for. In a population
    trials meet at `exchanges` after each `exchange_every` steps."""
    folder, pack = Path(settings["folder"]), settings["pack"]
    record = read_record(folder)
    try:
        if record.state != "running":
            for row in record.rows:
                if "eval_loss" in row:
                    report(row)
            return

        def current() -> TrainConfig:
            return with_secrets(read_record(folder).config)

        meet = functools.partial(_meet, exchanges, number=record.number, pack=pack)
        if exchanges is not None:
            ray.get(exchanges.enter.remote(record.number))
        if pack is not None:
            _train_in_pack(current, packs[pack], name=str(record.number), meet=meet)
        else:
            every = exchange_every
            _train_alone(current, turnstile, number=record.number, parent=parent, meet=meet, exchange_every=every)
    except Exception as error:
        note_error(folder, error)
        raise


def _meet(exchanges: Any, row: dict[str, Any] | None, *, number: int, pack: int | None) -> bool:
    if exchanges is None or row is None:
        return False
    return ray.get(exchanges.meet.remote(number, row["step"], pack))


def report(row: dict[str, Any]) -> None:
    """An evaluation, to Ray Tune; returns when the trial may go on."""
    from ray import tune

    tune.report({key: row[key] for key in ("step", "loss", "eval_loss", "eval_tokens") if key in row})


def _train_in_pack(current: Current, pack: Any, *, name: str, meet: Meet) -> None:
    def join() -> dict[str, Any] | None:
        config = current()
        return _answer_of(lambda: pack.join.remote(name, config))

    row = join()
    while True:
        while meet(row):
            row = join()
        row = ray.get(pack.go_on.remote(name))
        if row is None:
            break
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


def _train_alone(
    current: Current, turnstile: Any, *, number: int, parent: str | None, meet: Meet, exchange_every: int | None
) -> None:
    """A Ray Train run; in a population one from exchange to exchange. Its last evaluation is reported once its result
    is written."""
    from app.training.fine_tuning import plan_job

    while True:
        job = plan_job(current())
        step = job.checkpoints.latest_step()
        if exchange_every is not None and step and meet(_last_row(job, step)):
            continue
        until = None if exchange_every is None else (step // exchange_every + 1) * exchange_every
        until = None if until is None or until >= job.total_steps else until
        _train_until(until, job, turnstile, number=number, parent=parent)
        if until is None:
            return


def _last_row(job: Any, step: int) -> dict[str, Any] | None:
    """What was told of the saved `step`; written down here if the trial's process was lost before it had."""
    from app.training.run_log import RunLog

    log = RunLog(Path(job.config.output), start_step=step)
    log.recover(job.checkpoints.unwritten_rows())
    return next(reversed(log.rows), None)


def _train_until(until: int | None, job: Any, turnstile: Any, *, number: int, parent: str | None) -> None:
    """To the step `until`, or to the end."""
    from app.training.fine_tuning import fine_tune

    last: list[dict[str, Any]] = []

    def on_metrics(row: dict[str, Any]) -> None:
        if row["step"] == job.total_steps:
            last.append(row)
        elif "eval_loss" in row:
            report(row)

    ray.get(turnstile.enter.remote(number))
    try:
        is_begun = (Path(job.config.output) / "config.json").exists()
        fine_tune(job, resume=is_begun, on_metrics=on_metrics, parent=parent, until=until)
    finally:
        ray.get(turnstile.leave.remote(number))
    for row in last[-1:]:
        report(row)
