"""Gauges that Ray would forget; tests/serving/test_prometheus.py sees them last in a real Prometheus."""

import gc
import weakref
from typing import Any

import pytest

from app import gauges
from app.gauges import LastingGauge
from tests.serving.load import until


class Gauge:
    def __init__(self) -> None:
        self.told: list[tuple[float, dict[str, str]]] = []

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.told.append((value, tags or {}))


def test_values_are_told_again_until_they_are_dropped() -> None:
    inner = Gauge()
    gauge = LastingGauge(inner)
    gauge.set(1.0, tags={"run": "a"})
    gauge.set(2.0, tags={"run": "b"})
    gauge.set(3.0, tags={"run": "a"})
    inner.told.clear()
    gauge.repeat()
    assert inner.told == [(3.0, {"run": "a"}), (2.0, {"run": "b"})]
    gauge.drop(tags={"run": "a"})
    gauge.drop(tags={"run": "nobody"})
    inner.told.clear()
    gauge.repeat()
    assert inner.told == [(2.0, {"run": "b"})]


def test_a_thread_tells_them_and_keeps_none_that_nobody_else_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "REPEAT_EVERY_S", 0.01)
    monkeypatch.setattr(gauges, "_REPEATER", gauges._Repeater())
    inner = Gauge()
    gauge: Any = LastingGauge(inner)
    gauge.set(1.0)
    until(lambda: len(inner.told) > 2)
    alive = weakref.ref(gauge)
    del gauge
    until(lambda: gc.collect() is not None and alive() is None)
