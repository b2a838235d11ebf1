"""OUTPUT/report.html: a run on one page, from its metrics, summary, settings and samples. Self-contained."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app import pages
from app.atomic import write_text
from app.training.loop import Metrics
from app.training.samples import BeforeAndAfter

REPORT = "report.html"

_TRAINING, _HELD_OUT = "0.65", "tab:blue"


@dataclass(frozen=True)
class Report:
    title: str
    output: Path
    rows: Sequence[Metrics]
    """Of metrics.jsonl."""
    summary: dict[str, Any]
    """Of result.json."""
    settings: dict[str, Any]
    """Flat: key to text."""
    samples: Sequence[BeforeAndAfter] = field(default=())


def write_report(report: Report) -> Path:
    """Write the page, in one step; returns where."""
    path = report.output / REPORT
    write_text(path, _page(report))
    return path


def _page(report: Report) -> str:
    plots: list[Callable[..., None]] = [
        _loss_plot, _learning_rate_plot, _gradient_plot, _throughput_plot, _step_time_plot, _memory_plot,
    ]  # fmt: skip
    parts = [
        pages.tiles(_tiles(report.summary)),
        pages.figures(*(functools.partial(plot, rows=report.rows) for plot in plots)),
        pages.heading("How it ran"),
        pages.table(_facts(report)),
    ]
    if report.samples:
        parts.append(
            pages.heading("Samples", note="Held-out prompts, answered greedily by the model before training and after.")
        )
        parts += [_sample(number, sample) for number, sample in enumerate(report.samples, start=1)]
    parts.append(pages.folded("Settings", pages.table(report.settings)))
    return pages.page(report.title, note=str(report.output), parts=parts)


def _tiles(summary: dict[str, Any]) -> dict[str, str | None]:
    cost = summary.get("cost")
    return {
        "held-out loss": _change(summary, "eval_loss", "{:.3f}"),
        "held-out perplexity": _change(summary, "perplexity", "{:,.1f}"),
        "bits per byte": _shown(summary.get("bits_per_byte"), "{:.3f}"),
        "tokens per second": _shown(summary.get("tokens_per_s"), "{:,.0f}"),
        "a worker's peak memory": _shown(summary.get("peak_worker_bytes"), "{:.2f} GiB", scale=2**-30),
        "worker-hours": _shown(summary.get("worker_hours"), "{:,.3g}"),
        "cost": _shown(cost, "{:,.4g}"),
        "cost per million tokens": _shown(summary.get("cost_per_million_tokens"), "{:,.4g}"),
    }


def _change(summary: dict[str, Any], key: str, form: str) -> str | None:
    before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
    if before is None or after is None:
        return _shown(summary.get(key), form)
    return f"{form.format(before)} → {form.format(after)}"


def _shown(value: float | None, form: str, *, scale: float = 1) -> str | None:
    return None if value is None else form.format(value * scale)


def _facts(report: Report) -> dict[str, object]:
    summary, rows = report.summary, report.rows
    counts = sorted({row["workers"] for row in rows if "workers" in row})
    kernels = summary.get("kernels") or {}
    trained = summary.get("trained_parameters")
    price = report.settings.get("workers.price_per_hour")
    return {
        "steps": max((row["step"] for row in rows), default=0),
        "tokens trained on": summary.get("tokens"),
        "weights trained": None if trained is None else f"{trained:,}",
        "workers": " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]])) if counts else None,
        "computed in": summary.get("precision"),
        "kernels": ", ".join(f"{name} by {version}" for name, version in kernels.items()) or None,
        "cost": None if price in (None, "null") else f"{price} a worker and hour, over all sessions of the run",
        "result": summary.get("result"),
        "registered as": summary.get("registered"),
        "MLflow": summary.get("mlflow_run"),
    }


def _sample(number: int, sample: BeforeAndAfter) -> str:
    texts = {"before": sample.before, "after": sample.after or "", "reference": sample.reference}
    return pages.block(pages.columns({f"prompt {number}": sample.prompt}) + pages.columns(texts))


# --- plots ---


def _loss_plot(axes: Any, rows: Sequence[Metrics]) -> None:
    _line(axes, rows, "loss", color=_TRAINING, label="training batch")
    _line(axes, rows, "eval_loss", color=_HELD_OUT, label="held-out records", marker="o", markersize=3)
    axes.set(title="Loss", xlabel="step", ylabel="nats per token")
    if axes.lines:
        axes.legend()


def _learning_rate_plot(axes: Any, rows: Sequence[Metrics]) -> None:
    _line(axes, rows, "learning_rate", color="tab:orange")
    axes.set(title="Learning rate", xlabel="step")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _gradient_plot(axes: Any, rows: Sequence[Metrics]) -> None:
    _line(axes, rows, "gradient_norm", color="tab:red")
    axes.set(title="Gradient norm, before clipping", xlabel="step")


def _throughput_plot(axes: Any, rows: Sequence[Metrics]) -> None:
    steps = [(row["step"], row["tokens"] / row["step_s"]) for row in _warm(rows)]
    if steps:
        axes.plot(*zip(*steps, strict=True), color="tab:green", linewidth=0.9)
    axes.set(title="Throughput", xlabel="step", ylabel="tokens per second", ylim=(0, None))


def _step_time_plot(axes: Any, rows: Sequence[Metrics]) -> None:
    _line(axes, _warm(rows), "step_s", color="tab:purple")
    axes.set(title="Time of a step", xlabel="step", ylabel="seconds", ylim=(0, None))


def _memory_plot(axes: Any, rows: Sequence[Metrics]) -> None:
    """Of each worker, as all of them tell it at evaluations."""
    for key, style, kind in (("worker_bytes", "-", ""), ("worker_gpu_bytes", "--", ", GPU")):
        most = max((len(row[key]) for row in rows if key in row), default=0)
        for rank in range(most):
            told = [(row["step"], row[key][rank] / 2**30) for row in rows if len(row.get(key, ())) > rank]
            axes.plot(*zip(*told, strict=True), style, marker="o", markersize=3, label=f"worker {rank}{kind}")
    axes.set(title="Peak memory of each worker", xlabel="step", ylabel="GiB", ylim=(0, None))
    if 0 < len(axes.lines) <= 8:
        axes.legend()


def _warm(rows: Sequence[Metrics]) -> list[Metrics]:
    """Without the first step, which warms caches up, and would set the scale."""
    return [row for row in rows if row.get("step_s")][1:]


def _line(axes: Any, rows: Sequence[Metrics], key: str, **style: Any) -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=0.9, **style)
