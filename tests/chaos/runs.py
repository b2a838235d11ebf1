"""A training run watched from outside, by its folder."""

import json
import threading
import time
from pathlib import Path
from typing import Self

from tests.chaos.cluster import wait_for


class Watched:
    """Within the block, the steps that `run/metrics.jsonl` tells of, and when each was first seen.

    A step that is computed again takes the place of what followed it in the file, so what is there no more counts.
    """

    def __init__(self, run: Path) -> None:
        self.seen: list[tuple[float, int]] = []
        """A moment, and the newest step from then on."""
        self.losses: dict[int, list[float]] = {}
        self._file = run / "metrics.jsonl"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    @property
    def step(self) -> int:
        return self.seen[-1][1] if self.seen else 0

    def wait_for_step(self, step: int, *, within_s: float = 300) -> None:
        wait_for(lambda: self.step >= step, what=f"step {step}", within_s=within_s)

    def steps_again(self) -> int:
        """How many were computed, thrown away and computed again."""
        return sum(max(0, before - now) + 1 for (_, before), (_, now) in self._pairs() if now <= before)

    def seconds_to_pass(self, step: int, *, since: float) -> float:
        return next(moment for moment, newest in self.seen if moment > since and newest > step) - since

    def longest_pause_s(self, *, since: float) -> float:
        """Between two steps that were first seen."""
        moments = [moment for moment, _ in self.seen if moment > since]
        return max(after - before for before, after in zip(moments, moments[1:], strict=False))

    def _pairs(self) -> zip:
        return zip(self.seen, self.seen[1:], strict=False)

    def _watch(self) -> None:
        while not self._stop.wait(0.03):
            self._look()

    def _look(self) -> None:
        try:
            lines = self._file.read_text().splitlines()
        except OSError:
            return
        rows = [json.loads(line) for line in lines if _is_whole(line)]
        losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
        for step, loss in losses.items():
            known = self.losses.setdefault(step, [])
            if not known or known[-1] != loss:
                known.append(loss)
        newest = max(losses, default=0)
        if newest != self.step:
            self.seen.append((time.monotonic(), newest))


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def workers_of(run: Path) -> list[int]:
    """How many computed each step."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row["workers"] for row in map(json.loads, filter(_is_whole, lines)) if "loss" in row]


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(file.parent.name.removeprefix("step-")) for file in run.glob("checkpoints/step-*/state.json"))


def _is_whole(line: str) -> bool:
    """It may be read while it is written."""
    return line.endswith("}")
