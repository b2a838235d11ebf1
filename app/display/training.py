"""What `pacos train`, `pretrain`, `models` and `promote` show: a bar while a job goes, tables at its end."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from app import console
from app.config import PromoteConfig, TrainConfig

if TYPE_CHECKING:  # with it comes torch, which most commands can do without
    from app.tracking.registry import Version

_STEPS_AVERAGED = 20

Show = Callable[[dict[str, Any]], None]


@contextmanager
def training_progress(title: str, total: int) -> Iterator[Show]:
    """A bar with loss, learning rate, tokens a second and the time left; yields what takes the metrics."""
    recent: deque[dict[str, Any]] = deque(maxlen=_STEPS_AVERAGED)
    with console.progress(title, unit="steps", is_compact=True) as advance:

        def show(metrics: dict[str, Any]) -> None:
            if "kernels" in metrics:
                kernels = ", ".join(f"{name} by {version}" for name, version in metrics["kernels"].items())
                console.say(f"computing in {metrics['precision']}; {kernels}", style="dim")
            if "eval_loss" in metrics:
                note = f"loss {metrics['loss']:.3f}" if "loss" in metrics else ""
                console.say(
                    f"step {metrics['step']:>6,}  {note:12}  held-out loss {metrics['eval_loss']:.3f}  "
                    f"perplexity {metrics['perplexity']:,.1f}"
                )
            if "step_s" in metrics:
                recent.append(metrics)
            advance(metrics["step"], total, _note(metrics, recent))

        yield show


def _note(metrics: dict[str, Any], recent: deque[dict[str, Any]]) -> str:
    if "loss" not in metrics:
        return ""
    rate = sum(row["tokens"] for row in recent) / max(1e-9, sum(row["step_s"] for row in recent))
    return f"loss {metrics['loss']:.3f}  lr {metrics['learning_rate']:.1e}  {console.short_number(rate)} tok/s"


def show_trained(config: TrainConfig, summary: dict[str, Any]) -> None:
    console.table(
        f"Trained → {summary['result']}",
        {
            "training loss": _change(summary["loss_first"], summary["loss_last"]),
            "held-out loss": _change(summary["eval_loss_before"], summary["eval_loss_after"]),
            "held-out perplexity": _change(summary["perplexity_before"], summary["perplexity_after"]),
            "tokens per second": summary["tokens_per_s"],
            "computed in": summary["precision"],
            "peak memory per worker": f"{(summary['peak_worker_bytes'] or 0) / 2**30:.2f} GiB",
            "worker-hours": summary["worker_hours"],
            "cost": cost_text(summary),
            "registered as": summary.get("registered"),
            "report": f"{config.output}/report.html",
        },
    )


def show_pretrained(output: str, summary: dict[str, Any]) -> None:
    hidden = ("cost_per_million_tokens", "mlflow_run", "registered")
    shown = {key: value for key, value in summary.items() if key not in hidden}
    console.table("Pretrained", {**shown, "cost": cost_text(summary), "report": f"{output}/report.html"})


def cost_text(summary: dict[str, Any]) -> str | None:
    """None where the run has no price."""
    if summary["cost"] is None:
        return None
    per_million = summary["cost_per_million_tokens"]
    each = f", {per_million:,.4g} per million tokens" if per_million is not None else ""
    return f"{summary['cost']:,.4g}{each}"


def show_versions(versions: "list[Version]") -> None:
    if not versions:
        console.say("nothing is registered; `pacos train … register_as=NAME` registers a run's delta")
        return
    for name, of_name in groupby(versions, key=lambda version: version.name):
        console.grid(
            name,
            ("version", "alias", "method", "loss", "perplexity", "cost", "base"),
            [_version_row(version) for version in of_name],
            right=(0, 3, 4, 5),
            last=False,
        )


def _version_row(version: "Version") -> tuple[str, ...]:
    def figure(key: str, form: str) -> str:
        return form.format(float(version.tags[key])) if key in version.tags else ""

    return (
        str(version.version),
        ", ".join(version.aliases),
        version.tags.get("method", ""),
        figure("eval_loss", "{:.3f}"),
        figure("perplexity", "{:,.1f}"),
        figure("cost", "{:,.3g}"),
        version.tags.get("base", ""),
    )


def show_promoted(config: PromoteConfig, before: int | None) -> None:
    was = "" if before is None else f", which was {before}"
    console.say(
        f"{config.name}@{config.alias} is version {config.version}{was}; "
        f"what serves models:/{config.name}@{config.alias} follows"
    )


def _change(before: float | None, after: float | None) -> str | None:
    return None if before is None or after is None else f"{before:,.3f} → {after:,.3f}"
