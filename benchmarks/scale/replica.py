"""A generator replica in simulated time: continuous batching as `app/engine/scheduler.py` does it, without its tensors.

A step computes one row for each answer that is being generated and as many rows of prompts as its budget leaves. How
long it takes is a `StepTime`. Steps that read no prompt and end no answer are taken together, in one event.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush
from math import ceil

from app.engine.step_time import AnswerLength, queued_s
from app.engine.step_time import StepTime as Observed
from app.serving.autoscaling import share_of_rate

BLOCK_SIZE = 16
"""Of the KV cache, as in `app.engine.blocks`."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by how many answers it continues, between the points of a table, and by prompt tokens.

    On a GPU a step that reads a prompt is launched operation by operation, others are replayed as a whole: so there
    are two tables.
    """

    decoding: Sequence[tuple[int, float]]
    """(answers, seconds) where no prompt is read; beyond the last point along the last two."""
    reading: Sequence[tuple[int, float]]
    """The same where one is, before its tokens are counted."""
    prompt_token_s: float
    """For each prompt token that is read."""

    @cache  # noqa: B019 - a few objects, as long as the process
    def tables(self, max_batch_size: int) -> tuple[list[float], list[float]]:
        """Both for every number of answers."""
        counts = range(max_batch_size + 1)
        return [interpolated(self.decoding, count) for count in counts], [
            interpolated(self.reading, count) for count in counts
        ]


def interpolated(points: Sequence[tuple[int, float]], x: float) -> float:
    """On the lines through `points`, in the order of their x; beyond them on the first or last line."""
    if len(points) == 1:
        return points[0][1]
    after = min(max(bisect_right(points, x, key=lambda point: point[0]), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class Request:
    __slots__ = ("prompt", "new", "arrived", "path")

    def __init__(self, prompt: int, new: int, arrived: float) -> None:
        self.prompt = prompt
        """Tokens; so is the next."""
        self.new = new
        self.arrived = arrived
        self.path: tuple = ()
        """The processes that carry its tokens; the cluster's business."""


@dataclass(frozen=True)
class EngineLimits:
    """As `EngineSettings` and `serve_config.yaml` name them."""

    max_batch_size: int = 64
    max_queue: int = 512
    max_step_tokens: int = 512
    gather_s: float = 0.0
    """Prompts that come while answers are generated wait so long for each other. Not in the engine: what it would bring
    is a question to the simulation."""


class Replica:
    """`add` and `advance` return when `advance` is to be called next: the time, and the `version` that it holds for."""

    def __init__(self, step_time: StepTime, limits: EngineLimits, *, ready_at: float = 0.0) -> None:
        self.ready_at = ready_at
        self.stopping = False
        self.waiting: deque[Request] = deque()
        self.queued_tokens = 0
        self.decoding = 0
        self.version = 0
        self.tokens = 0
        self._limits = limits
        self._decoding_s, self._reading_s = step_time.tables(limits.max_batch_size)
        self._prompt_token_s = step_time.prompt_token_s
        self._budget = max(limits.max_step_tokens, limits.max_batch_size + BLOCK_SIZE)
        self._reading: list[list] = []  # [request, prompt tokens that are left], in order of arrival
        self._read_now: list[Request] = []  # whose first token this step gives
        self._finishes: list[tuple[int, int, Request]] = []  # (the step that gives the last token, a tie-break, …)
        self.steps = self._count = 0
        self._steps, self._each_s, self._since = 0, 0.0, 0.0  # what is being computed: how many steps, since when
        self._gathered_at = 0.0
        self._observed, self._length = Observed(), AnswerLength()

    @property
    def running(self) -> int:
        return self.decoding + len(self._reading) + len(self._read_now)

    @property
    def ongoing(self) -> int:
        """What Serve's router compares."""
        return self.running + len(self.waiting)

    @property
    def use(self) -> float:
        """As `autoscaling.replica_load`, with KV caches that are never full."""
        line = self._observed
        places = self._limits.max_batch_size
        return share_of_rate(self.running, places, fixed_s=line.fixed_s, answer_s=line.answer_s)

    @property
    def queued_s(self) -> float:
        """As `Engine.stats`."""
        places = self._limits.max_batch_size
        return queued_s(
            self._observed, self._length, waiting=len(self.waiting), queued_tokens=self.queued_tokens, places=places
        )

    @property
    def has_room(self) -> bool:
        """As `Scheduler.check_room`."""
        return len(self.waiting) < self._limits.max_queue + self._limits.max_batch_size - self.running

    def decode_step_s(self) -> float:
        return self._decoding_s[max(1, self.decoding)]

    def add(self, request: Request, now: float) -> float | None:
        self.waiting.append(request)
        self.queued_tokens += request.prompt + request.new
        if not self._steps:
            return self._begin(now)
        if self._steps > 1 and self.running < self._limits.max_batch_size:  # it joins at the next step
            wanted = max(now, self._gathered_at + self._limits.gather_s)
            steps = max(1, ceil((wanted - self._since) / self._each_s - 1e-9))
            if steps < self._steps:
                self._steps = steps
                self.version += 1
                return self._since + steps * self._each_s
        return None

    def advance(self, now: float) -> tuple[list[Request], list[Request], float | None]:
        """The end of what was being computed: (first token computed, ended, when this is to be called next)."""
        self._observed.observe(self.running, self._each_s, steps=self._steps)
        self.steps += self._steps
        self.tokens += self._steps * self.decoding + len(self._read_now)
        ended = []
        while self._finishes and self._finishes[0][0] <= self.steps:
            ended.append(heappop(self._finishes)[2])
        self.decoding -= len(ended)
        begun, self._read_now = self._read_now, []
        for request in begun:
            if request.new == 1:
                ended.append(request)
            else:
                self.decoding += 1
                self._count += 1
                heappush(self._finishes, (self.steps + request.new - 1, self._count, request))
        for request in ended:
            self._length.observe(request.new)
        self._steps = 0
        return begun, ended, self._begin(now)

    def _begin(self, now: float) -> float | None:
        num_prompt_tokens = self._read(now)
        if not (num_prompt_tokens or self.decoding):
            return None
        if num_prompt_tokens:
            self._each_s = self._reading_s[self.decoding] + num_prompt_tokens * self._prompt_token_s
        else:
            self._each_s = self._decoding_s[self.decoding]
        self._steps = 1 if num_prompt_tokens or self._reading else self._finishes[0][0] - self.steps
        if self.waiting and not num_prompt_tokens and self.running < self._limits.max_batch_size:
            left_s = self._gathered_at + self._limits.gather_s - now
            self._steps = max(1, min(self._steps, ceil(left_s / self._each_s)))
        self._since = now
        self.version += 1
        return now + self._steps * self._each_s

    def _read(self, now: float) -> int:
        """Choose the prompts of the next step; their tokens."""
        if not (self.waiting or self._reading):
            return 0
        budget = self._budget - self.decoding
        is_gathering = self.decoding and not self._reading and now < self._gathered_at + self._limits.gather_s - 1e-12
        if not is_gathering:
            chosen, slots = sum(left for _, left in self._reading), self._limits.max_batch_size - self.running
            while self.waiting and slots and chosen < budget:
                request = self.waiting.popleft()
                self.queued_tokens -= request.prompt + request.new
                self._reading.append([request, request.prompt])
                chosen += request.prompt
                slots -= 1
        read = 0
        for entry in self._reading:
            tokens = min(entry[1], budget - read)
            entry[1] -= tokens
            read += tokens
        if read:
            self._gathered_at = now
            self._read_now = [request for request, left in self._reading if not left]
            self._reading = [entry for entry in self._reading if entry[1]]
        return read
