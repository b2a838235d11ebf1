"""What a soak's samples are taken to say."""

from typing import Any

from benchmarks.soak.plot import draw
from benchmarks.soak.verdict import verdict

MINUTES = 40
MOMENTS = [float(second) for second in range(0, 60 * MINUTES, 10)]


def judged(*, growth: float = 0.0, slowdown: float = 0.0, met: int | str = 200, ends: bool = False) -> dict[str, Any]:
    """A process that grows by a half while it warms up and by `growth` afterwards, answers that take `slowdown` longer
    in the end."""

    def size(second: float) -> int | None:
        warmth, age = min(1.0, second / 600), max(0.0, second - 600) / 1800
        return None if ends and second > 2000 else int(10**8 * (0.5 + 0.5 * warmth + growth * age))

    memory = {"elapsed_s": MOMENTS, "bytes": {"head gcs_server 7": [size(second) for second in MOMENTS],
                                              "head redis 8": [10**7 for _ in MOMENTS]}}  # fmt: skip
    chat = [(second, 0.1 * (1 + slowdown * (second > 1800)), [200]) for second in MOMENTS]
    return verdict(MINUTES, memory=memory, requests={"chat": [*chat[:-1], (*chat[-1][:2], [met, 200])]})


def reached(report: dict[str, Any]) -> list[bool]:
    return [bar["reached"] for bar in report["bars"]]


def test_memory_that_grows_while_caches_fill_is_no_leak() -> None:
    report = judged(growth=0.04)
    assert reached(report) == [True, True, True] and not report["grown"]


def test_a_process_that_grows_afterwards_is_named() -> None:
    report = judged(growth=0.1)
    assert reached(report) == [False, True, True]
    assert list(report["grown"]) == ["head gcs_server 7"] and 0.08 < report["grown"]["head gcs_server 7"] < 0.1


def test_a_process_that_came_or_went_is_not_judged() -> None:
    assert reached(judged(growth=0.5, ends=True)) == [True, True, True]


def test_answers_that_become_slower_are_told() -> None:
    report = judged(slowdown=0.5)
    assert reached(report) == [True, False, True] and set(report["slower"]) == {"chat, median", "chat, 95th percentile"}


def test_a_5xx_counts_also_where_the_next_try_was_answered() -> None:
    for met in (503, "ReadError"):
        report = judged(met=met)
        assert reached(report) == [True, True, False] and report["bars"][2]["measured"] == 1
    assert reached(judged(met=429)) == [True, True, True]


def test_it_is_drawn(tmp_path) -> None:
    draw(judged(ends=True), tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000
