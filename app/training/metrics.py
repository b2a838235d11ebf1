"""What Prometheus sees of a run while it goes, from whoever records it: the driver, or the pack that the run is in.

Ray exports it at that process' node, with `ray_` in front. Gauges are there while the run goes on, and a few seconds
longer; a counter is as long as the node.
"""

import time
from typing import Any, Literal

from ray.util import metrics

from app.errors import Diverged
from app.gauges import LastingGauge

Outcome = Literal["finished", "stopped", "diverged", "failed"]

_RUN = ("run",)
_GAUGES = {
    "step": "Optimizer steps made.",
    "loss": "Of the last step's response tokens, in nats.",
    "eval_loss": "Of the held-out records' response tokens, in nats.",
    "learning_rate": "Of the last step.",
    "gradient_norm": "Of the last step, before clipping.",
    "workers": "Workers that make the steps; in a pack the run's share of one.",
    "peak_worker_bytes": "Most memory that the first worker has held.",
}
"""Those of what a run reports that are shown as they are."""


class RunMetrics:
    """Of one run, for a block; the block's exception tells how it ended, unless `end` has."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges = {name: _gauge(name, text) for name, text in _GAUGES.items()}
        self._rate = _gauge("tokens_per_second", "Of the last step, padding left out.")
        self._running = _gauge("running", "1 while the run goes on.")
        self._reported = _gauge("reported_timestamp_seconds", "When the run last reported a step or an evaluation.")
        self._tokens = _counter("tokens", "Tokens trained on, padding left out.", ("run",))
        self._ended = _counter(
            "runs_ended", "Runs that ended: finished, stopped, diverged or failed.", ("run", "outcome")
        )
        self._is_running = False

    def __enter__(self) -> "RunMetrics":
        self._is_running = True
        self._running.set(1.0, tags=self._tags)
        self._reported.set(time.time(), tags=self._tags)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.end_by(error)

    def add(self, row: dict[str, Any]) -> None:
        """What the run reports of a step."""
        for name, gauge in self._gauges.items():
            if name in row:
                gauge.set(row[name], tags=self._tags)
        if tokens := row.get("tokens"):
            self._tokens.inc(tokens, tags=self._tags)
            self._rate.set(tokens / row["step_s"], tags=self._tags)
        self._reported.set(time.time(), tags=self._tags)

    def end(self, outcome: Outcome) -> None:
        """The first word counts."""
        if self._is_running:
            self._is_running = False
            for gauge in (*self._gauges.values(), self._rate, self._running, self._reported):
                gauge.drop(tags=self._tags)
            self._ended.inc(tags={**self._tags, "outcome": outcome})

    def end_by(self, error: BaseException | None) -> None:
        """It ends unfinished, by `error` or without one."""
        if isinstance(error, Diverged | FloatingPointError):
            self.end("diverged")
        elif error is None or isinstance(error, KeyboardInterrupt | SystemExit):
            self.end("stopped")
        else:
            self.end("failed")


def _gauge(name: str, text: str) -> LastingGauge:
    return LastingGauge(metrics.Gauge(f"pacos_train_{name}", description=text, tag_keys=_RUN))


def _counter(name: str, text: str, tags: tuple[str, ...]) -> Any:
    return metrics.Counter(f"pacos_train_{name}", description=text, tag_keys=tags)
