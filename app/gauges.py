"""Gauges whose values last: Ray shows one for two of its intervals after it was set, 20 seconds, and then no more."""

import threading
import time
import weakref
from typing import Any

REPEAT_EVERY_S = 5.0


class LastingGauge:
    """One of Ray's gauges, whose values are set again every few seconds, until they are dropped or this object is."""

    def __init__(self, gauge: Any) -> None:
        self._gauge = gauge
        self._values: dict[tuple[tuple[str, str], ...], float] = {}
        _REPEATER.add(self)

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self._values[tuple((tags or {}).items())] = value
        self._gauge.set(value, tags=tags)

    def drop(self, tags: dict[str, str] | None = None) -> None:
        """It is shown for some seconds yet."""
        self._values.pop(tuple((tags or {}).items()), None)

    def repeat(self) -> None:
        for tags, value in list(self._values.items()):
            self._gauge.set(value, tags=dict(tags))


class _Repeater:
    """One thread for all gauges of the process, from the first one on."""

    def __init__(self) -> None:
        self._gauges: weakref.WeakSet[LastingGauge] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._has_begun = False

    def add(self, gauge: LastingGauge) -> None:
        with self._lock:
            self._gauges.add(gauge)
            if not self._has_begun:
                threading.Thread(target=self._run, name="gauges", daemon=True).start()
            self._has_begun = True

    def _run(self) -> None:
        while True:
            time.sleep(REPEAT_EVERY_S)
            self._repeat()

    def _repeat(self) -> None:
        with self._lock:
            gauges = list(self._gauges)
        for gauge in gauges:
            gauge.repeat()


_REPEATER = _Repeater()
