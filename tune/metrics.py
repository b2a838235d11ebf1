"""What Prometheus sees of a sweep while it goes, from its driver. Its trials are runs, with metrics of their own."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

from ray.util import metrics

from tune.records import State, TrialRecord

_TELL_EVERY_S = 5.0


class SweepMetrics:
    def __init__(self, sweep: str) -> None:
        self._tags = {"sweep": sweep}
        self._trials = _gauge("trials", "Trials by their state.", ("sweep", "state"))
        self._best = _gauge("best_loss", "Lowest held-out loss of a trial, in nats.", ("sweep",))
        self._tokens = _gauge("tokens", "Tokens that all trials have trained on.", ("sweep",))

    def set(self, records: Sequence[TrialRecord]) -> None:
        counts = Counter(record.state for record in records)
        for state in get_args(State):
            self._trials.set(counts[state], tags={**self._tags, "state": state})
        self._tokens.set(sum(record.tokens for record in records), tags=self._tags)
        losses = [record.loss for record in records if record.loss is not None]
        if losses:
            self._best.set(min(losses), tags=self._tags)


@contextmanager
def told_to_prometheus(sweep: str, records: Callable[[], Sequence[TrialRecord]]) -> Iterator[None]:
    """For the block, a thread tells what `records` returns, again and again."""
    told, ending = SweepMetrics(sweep), threading.Event()

    def tell() -> None:
        while not ending.wait(_TELL_EVERY_S):
            told.set(records())

    thread = threading.Thread(target=tell, name="sweep metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def _gauge(name: str, text: str, tags: tuple[str, ...]) -> Any:
    return metrics.Gauge(f"pacos_sweep_{name}", description=text, tag_keys=tags)
