"""What a run costs: the hours that its workers were held, over all sessions of a run that was resumed.

OUTPUT/worker_hours.json holds one entry a session, written while it goes, so that one that was killed counts too.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.atomic import write_text

_FILE = "worker_hours.json"
_WRITE_EVERY_S = 10.0


class WorkerHours:
    """Counts from its making on. Workers that are lost count as held until their successors report: they are paid for.

    `workers` is their number until the first `count`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int,
        price_per_hour: float | None,
        resume: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = folder / _FILE
        self._price = price_per_hour
        self._workers = workers
        self._clock = clock
        self._has_ended = False
        self._counted_at = self._written_at = clock()
        before = json.loads(self._file.read_text()) if resume and self._file.exists() else []
        self._sessions: list[dict[str, Any]] = [*before, {"worker_hours": 0.0, "price_per_hour": self._price}]

    def count(self, workers: int | None = None) -> None:
        """Count the time since the last call, with as many workers as that one named; now there are `workers`."""
        if self._has_ended:
            return
        now = self._clock()
        self._sessions[-1]["worker_hours"] += self._workers * (now - self._counted_at) / 3600
        self._counted_at, self._workers = now, workers or self._workers
        if now - self._written_at > _WRITE_EVERY_S:
            self.write()

    def end(self) -> None:
        """Count the rest; the workers are gone. Calling it again changes nothing."""
        self.count()
        self._has_ended = True
        self.write()

    def write(self) -> None:
        self._written_at = self._clock()
        write_text(self._file, json.dumps(self._sessions, indent=2) + "\n")

    def figures(self, *, tokens: int) -> dict[str, float | None]:
        """Worker-hours, cost, and cost per million of the `tokens` that were trained on.

        A session goes at the price that was set for it, one without at the price that is set now.
        """
        hours = sum(session["worker_hours"] for session in self._sessions)
        if self._price is None:
            return {"worker_hours": hours, "cost": None, "cost_per_million_tokens": None}
        prices = (session["price_per_hour"] for session in self._sessions)
        cost = sum(
            session["worker_hours"] * (self._price if price is None else price)
            for session, price in zip(self._sessions, prices, strict=True)
        )
        return {
            "worker_hours": hours,
            "cost": cost,
            "cost_per_million_tokens": cost / tokens * 1e6 if tokens else None,
        }
