"""In place of Ray's metrics: keeps what they are told."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from app.gauges import LastingGauge

Seen = dict[str, list[tuple[float, dict[str, str]]]]
"""Values and their tags in order, by a metric's name without `pacos_`."""


def recorded(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Seen:
    """What the metrics are told that `module` makes from now on."""
    seen: Seen = {}

    class Recorded:
        def __init__(self, name: str, **about: Any) -> None:
            assert about["description"]
            self._values = seen.setdefault(name.removeprefix("pacos_"), [])
            self._tags = set(about["tag_keys"])

        def observe(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
            assert set(tags or {}) == self._tags
            self._values.append((value, tags or {}))

        inc = set = observe

    kinds = SimpleNamespace(Counter=Recorded, Gauge=Recorded, Histogram=Recorded)
    monkeypatch.setattr(module, "metrics", kinds)
    monkeypatch.setattr(LastingGauge, "repeat", lambda gauge: None)  # what is told anew, and nothing else
    return seen


def values(seen: Seen, name: str) -> list[float]:
    return [value for value, _ in seen[name]]
