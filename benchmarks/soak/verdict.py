"""What samples and requests of a soak say: pure arithmetic."""

from collections import Counter
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

WARM_UP, NUM_INTERVALS = 0.25, 60
MAX_GROWTH, MAX_SLOWDOWN = 0.05, 0.25
Asked = tuple[float, float, list[int | str]]
"""When it was asked, how long the answer took, what each of its tries met."""


def verdict(minutes: float, *, memory: dict[str, Any], requests: dict[str, list[Asked]]) -> dict[str, Any]:
    """The report: `bars`, what they follow from, and what is drawn: the memory of what is judged, and the answers in
    `NUM_INTERVALS` parts of the time."""
    from_s = WARM_UP * 60 * minutes
    growth = {
        process: grown(values)
        for process, series in memory["bytes"].items()
        if (values := after(memory["elapsed_s"], series, from_s)) and None not in values
    }
    latencies = {kind: in_thirds(asked, from_s=from_s, to_s=60 * minutes) for kind, asked in requests.items()}
    slowdown = {
        f"{kind}, {name}": thirds[-1] / thirds[0] - 1 for kind, by in latencies.items() for name, thirds in by.items()
    }
    met = {
        kind: dict(Counter(str(status) for _, _, met in asked for status in met)) for kind, asked in requests.items()
    }
    failed = sum(
        count for by in met.values() for status, count in by.items() if not status.isdecimal() or status >= "500"
    )
    large = {process: share for process, share in growth.items() if share > MAX_GROWTH}
    slower = {name: share for name, share in slowdown.items() if share > MAX_SLOWDOWN}
    bars = [
        _bar("memory of every process", f"grows by at most {MAX_GROWTH:.0%}", max(growth.values()), not large),
        _bar("median and 95th percentile of each kind", f"at most {MAX_SLOWDOWN:.0%} slower in the last third",
             max(slowdown.values()), not slower),
        _bar("5xx and broken connections", "none", failed, not failed),
    ]  # fmt: skip
    return {
        "minutes": minutes,
        "bars": bars,
        "processes": len(growth),
        "grown": large,
        "slower": slower,
        "met": met,
        "latencies_s": latencies,
        "memory": {
            "elapsed_s": memory["elapsed_s"],
            "mib": {process: [_mib(size) for size in memory["bytes"][process]] for process in growth},
        },
        "answers": {kind: _by_interval(asked, 60 * minutes / NUM_INTERVALS) for kind, asked in requests.items()},
    }


def after(moments: Sequence[float], values: Sequence[Any], from_s: float) -> list[Any]:
    return [value for moment, value in zip(moments, values, strict=True) if moment >= from_s]


def grown(values: Sequence[int]) -> float:
    """From the median of the first tenth to that of the last; one sample is as noisy as the moment."""
    num = max(1, len(values) // 10)
    return median(values[-num:]) / median(values[:num]) - 1


def in_thirds(asked: Sequence[Asked], *, from_s: float, to_s: float) -> dict[str, list[float]]:
    """Median and 95th percentile of the answers' seconds in each third of the time."""
    width = (to_s - from_s) / 3
    thirds = [[took for at, took, _ in asked if 0 <= at - from_s - n * width < width] for n in range(3)]
    return {
        "median": [round(median(third), 4) for third in thirds],
        "95th percentile": [round(quantiles(third, n=20)[-1], 4) for third in thirds],
    }


def _by_interval(asked: Sequence[Asked], width_s: float) -> dict[str, list[float]]:
    buckets: dict[int, list[float]] = {}
    for at, took, _ in asked:
        buckets.setdefault(int(at // width_s), []).append(took)
    return {
        "minutes": [round((number + 0.5) * width_s / 60, 2) for number in sorted(buckets)],
        "median_s": [round(median(buckets[number]), 4) for number in sorted(buckets)],
    }


def _mib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**20, 1)


def _bar(name: str, bar: str, measured: float, reached: bool) -> dict[str, Any]:
    return {"name": name, "bar": bar, "measured": round(measured, 4), "reached": reached}
