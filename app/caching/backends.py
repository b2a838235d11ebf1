"""Where cached texts are kept: in this process, or in Redis. Knows nothing of what they mean."""

import asyncio
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from app.config.serving import MemoryCacheConfig, RedisCacheConfig
from app.errors import UserError

if TYPE_CHECKING:
    from redis.asyncio import Redis

PASSWORD_VARIABLE = "PACOS_REDIS_PASSWORD"
_PREFIX = "pacos:response:"
_PAUSE_S = 5.0

Result = TypeVar("Result")
Clock = Callable[[], float]


class BackendUnavailable(Exception):
    """The backend did not answer in time, or at all."""


class Backend(Protocol):
    """Each operation ends within the backend's own deadline: with a result, or with BackendUnavailable."""

    num_bytes: int
    """What this process' memory holds of it."""

    async def get(self, key: str) -> str | None: ...

    async def put(self, key: str, value: str, *, ttl_s: float) -> None: ...

    async def close(self) -> None: ...


def make_backend(config: MemoryCacheConfig | RedisCacheConfig) -> Backend:
    """The backend that `cache.backend` describes; connects to nothing yet.

    Raises:
        UserError: redis is asked for but not installed, or its URL cannot be one.
    """
    if isinstance(config, MemoryCacheConfig):
        return MemoryBackend(max_bytes=config.max_bytes)
    return RedisBackend(config.url, timeout_s=config.timeout_s)


class MemoryBackend:
    """The texts that were used last, as many as `max_bytes` hold; each replica of a deployment has its own."""

    def __init__(self, *, max_bytes: int, clock: Clock = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[str, tuple[str, float]] = OrderedDict()  # text and the time when it expires
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, key: str) -> str | None:
        if key not in self._entries:
            return None
        value, expires = self._entries[key]
        if self._clock() >= expires:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return value

    async def put(self, key: str, value: str, *, ttl_s: float) -> None:
        self._remove(key)
        if _bytes_of(key, value) > self._max_bytes:  # all others would have to go for nothing
            return
        self._entries[key] = (value, self._clock() + ttl_s)
        self.num_bytes += _bytes_of(key, value)
        while self.num_bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))

    async def close(self) -> None:
        self._entries.clear()
        self.num_bytes = 0

    def _remove(self, key: str) -> None:
        if key in self._entries:
            value, _ = self._entries.pop(key)
            self.num_bytes -= _bytes_of(key, value)


class RedisBackend:
    """A Redis server that all replicas share.

    Every operation has `timeout_s`, connecting included. After a failure the server is left alone for `pause_s`, so
    that an outage does not cost each request its timeout.
    """

    num_bytes = 0

    def __init__(self, url: str, *, timeout_s: float, pause_s: float = _PAUSE_S, clock: Clock = time.monotonic) -> None:
        self._client, self._errors = _client(url, timeout_s)
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._clock = clock
        self._paused_until = float("-inf")

    async def get(self, key: str) -> str | None:
        value = await self._within_deadline(lambda: self._client.get(_PREFIX + key))
        # bytes, unless the URL asks for decode_responses
        return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value

    async def put(self, key: str, value: str, *, ttl_s: float) -> None:
        milliseconds = max(1, round(ttl_s * 1000))
        await self._within_deadline(lambda: self._client.set(_PREFIX + key, value.encode(), px=milliseconds))

    async def close(self) -> None:
        await self._client.aclose()

    async def _within_deadline(self, operation: Callable[[], Awaitable[Result]]) -> Result:
        if self._clock() < self._paused_until:
            raise BackendUnavailable("Redis failed a moment ago and is left alone for now")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await operation()
        except self._errors as error:
            self._paused_until = self._clock() + self._pause_s
            reason = f"no answer within {self._timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            raise BackendUnavailable(f"Redis is unreachable ({reason})") from None


def _client(url: str, timeout_s: float) -> tuple["Redis", tuple[type[Exception], ...]]:
    """A client that has not connected yet, and what its operations raise when the server fails them."""
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError
    except ImportError:
        raise UserError("cache.backend.type='redis' needs the redis package; pip install pacos[redis]") from None
    try:
        client = Redis.from_url(
            url,
            password=os.environ.get(PASSWORD_VARIABLE),  # unless the URL has one
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:  # the URL itself may hold a password, so it is not shown
        raise UserError(f"cache.backend.url is not a Redis URL like redis://host:6379/0: {error}") from None
    return client, (RedisError, OSError, TimeoutError)


def _bytes_of(key: str, value: str) -> int:
    """What an entry takes, with Python's own objects around it."""
    return sys.getsizeof(key) + sys.getsizeof(value) + 250
