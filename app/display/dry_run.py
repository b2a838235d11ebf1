"""What a dry run found, in the terminal."""

import datetime
from typing import Any

import yaml

from app import console
from app.config.methods import name_of

_ROWS = (
    ("process", "process (Python, torch, Ray, DeepSpeed)"),
    ("frozen_weights", "frozen weights"),
    ("trained_weights", "trained weights, and ZeRO's copy"),
    ("gradients", "gradients"),
    ("optimizer", "AdamW's moments"),
    ("activations", "activations"),
    ("logits", "logits of a chunk"),
    ("allocator", "kept by the allocator"),
)


def show_forecast(forecast: Any) -> None:
    config = forecast.config
    console.say(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), style="dim")
    _show_memory(forecast)
    console.table("The run", _figures(forecast))
    if not forecast.fits:
        _show_remedies(forecast)
    elif forecast.trial is None:
        console.say("No GPU is here to try three steps on: memory is by arithmetic, and the time is unknown.")
    console.say(f"Nothing was written to {config.output}.", style="dim")


def _show_memory(forecast: Any) -> None:
    worker, trial, config = forecast.worker, forecast.expected_trial, forecast.config
    rows = [
        (name, _size(getattr(worker, key)), _size(getattr(trial, key)) if forecast.trial else "")
        for key, name in _ROWS
        if getattr(worker, key)
    ]
    rows.append(("sum", _size(worker.total), f"measured: {_size(forecast.trial.peak_bytes)}" if forecast.trial else ""))
    console.grid(
        f"Memory of each of {config.workers.least} workers with ZeRO-{config.deepspeed.zero_stage}",
        ("", "a worker", "the trial, one plain process" if forecast.trial else ""),
        rows,
        right=(1, 2),
    )


def _figures(forecast: Any) -> dict[str, object]:
    config = forecast.config
    trained = f"{forecast.trained_parameters:,} by {name_of(config.method)}, beside {forecast.total_parameters:,}"
    return {
        "trained parameters": trained,
        "steps": f"{forecast.steps:,} of {config.batch_size} rows, {forecast.epochs:.3g} times through the data",
        "tokens": f"{forecast.tokens:,}; {forecast.loss_tokens:,} in the loss",
        "a step": _seconds(forecast.step_s),
        "evaluations": _times(forecast.evaluations, forecast.evaluation_s),
        "checkpoints": _times(forecast.checkpoints, forecast.checkpoint_s),
        "expected time": _duration(forecast.total_s),
        "expected cost": forecast.cost,
    }


def _show_remedies(forecast: Any) -> None:
    config = forecast.config
    rows = config.micro_batch_size or -(-config.batch_size // config.workers.least)
    remedies = [f"micro_batch_size={rows // 2}"] if rows > 1 else []
    if not config.gradient_checkpointing:
        remedies.append("gradient_checkpointing=true")
    if config.deepspeed.zero_stage < 2 and config.workers.least > 1:
        remedies.append("deepspeed.zero_stage=2")
    console.say(
        f"All workers here need {_size(forecast.needed_bytes)} and there are {_size(forecast.available_bytes)}; try "
        f"{', '.join(remedies)}, fewer workers, or a technique that trains less"
        + ("." if forecast.trial else "; no step was tried."),
        style="bold yellow",
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _times(count: int, seconds: float | None) -> str | None:
    return f"{count} of {_seconds(seconds)}" if seconds is not None and count else None


def _seconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.3g} s"


def _duration(seconds: float | None) -> str | None:
    """As 1:02:03, without the start of Ray and its workers."""
    if seconds is None:
        return None
    return f"{datetime.timedelta(seconds=max(1, round(seconds)))} and the start of Ray"
