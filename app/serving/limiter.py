"""How much each key may ask: one deployment of one replica counts for all, so limits hold whoever answers."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from ray.serve.handle import DeploymentHandle

from app.config import ApiKeyConfig
from app.serving.guarded import PAUSE_S, GuardedHandle, Unavailable
from app.serving.messages import Refusal

DEADLINE_S = 0.5


@dataclass
class _Bucket:
    """What is left of a minute's allowance; it fills up evenly."""

    level: float
    seen_at: float

    def filled(self, per_minute: int, now: float) -> float:
        self.level = min(per_minute, self.level + (now - self.seen_at) * per_minute / 60)
        self.seen_at = now
        return self.level


class Limits:
    """The counts, by key. Knows no Ray."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}

    def admit(self, key: ApiKeyConfig) -> tuple[str, float] | None:
        """Count one request. Where it is one too many it is not counted: which limit, and seconds until it has room."""
        requests, tokens = key.requests_per_minute, key.tokens_per_minute
        if tokens is not None and (left := self._left(self._tokens, key.name, tokens)) <= 0:
            return "tokens_per_minute", (1 - left) * 60 / tokens
        if requests is not None:
            if (left := self._left(self._requests, key.name, requests)) < 1:
                return "requests_per_minute", (1 - left) * 60 / requests
            self._requests[key.name].level -= 1
        return None

    def charge(self, key: ApiKeyConfig, num_tokens: int) -> None:
        """Take what an answer has cost. The last one may overdraw the allowance: its length was not known before."""
        if key.tokens_per_minute is not None:
            self._left(self._tokens, key.name, key.tokens_per_minute)
            self._tokens[key.name].level -= num_tokens

    def _left(self, buckets: dict[str, _Bucket], name: str, per_minute: int) -> float:
        now = self._clock()
        return buckets.setdefault(name, _Bucket(per_minute, now)).filled(per_minute, now)


class LimiterDeployment:
    def __init__(self) -> None:
        self._limits = Limits()

    async def admit(self, key: ApiKeyConfig) -> tuple[str, float] | None:
        return self._limits.admit(key)

    async def charge(self, key: ApiKeyConfig, num_tokens: int) -> None:
        self._limits.charge(key, num_tokens)


class LimiterClient:
    """The deployment as the ingress sees it. Where it does not answer, this replica counts for itself."""

    def __init__(
        self,
        handle: DeploymentHandle,
        *,
        deadline_s: float = DEADLINE_S,
        pause_s: float = PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limiter = GuardedHandle(handle, name="limiter", deadline_s=deadline_s, pause_s=pause_s, clock=clock)
        self._own = Limits(clock=clock)

    async def admit(self, key: ApiKeyConfig) -> Refusal | None:
        if key.requests_per_minute is None and key.tokens_per_minute is None:
            return None
        exceeded = await self._call("admit", key)
        if exceeded is None:
            return None
        limit, wait_s = exceeded
        message = f"key {key.name!r} has used up its {limit}={getattr(key, limit)}"
        return Refusal(429, message, code="rate_limit_exceeded", retry_after_s=max(1, math.ceil(wait_s)))

    def charge(self, key: ApiKeyConfig, num_tokens: int) -> None:
        """In the background; nobody waits for it."""
        if key.tokens_per_minute is not None and num_tokens:
            self._limiter.in_background(self._call("charge", key, num_tokens))

    async def _call(self, method: str, *args: object) -> tuple[str, float] | None:
        try:
            return await self._limiter.call(method, *args)
        except Unavailable:
            return getattr(self._own, method)(*args)
