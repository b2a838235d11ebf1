"""The cache deployment, and the client that makes sure that it can only ever help."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ray.serve.handle import DeploymentHandle

from app.caching.backends import make_backend
from app.caching.exact import ResponseCache
from app.config import CacheConfig

logger = logging.getLogger("ray.serve")

DEADLINE_S = 0.25
"""A cache that takes longer to answer than this is a cache that missed."""
PAUSE_S = 5.0
"""After a failure requests go without the cache for so long, rather than each wait for the deadline."""


class CacheDeployment:
    def __init__(self, config: CacheConfig) -> None:
        self._cache = ResponseCache(make_backend(config.backend), config.ttl_s)

    async def get(self, key: str) -> dict[str, Any] | None:
        return await self._cache.get(key)

    async def put(self, key: str, value: dict[str, Any]) -> None:
        await self._cache.put(key, value)

    async def stats(self) -> dict[str, int]:
        return {"hits": self._cache.hits, "misses": self._cache.misses, "errors": self._cache.errors}


class CacheClient:
    """The deployment as other deployments see it: it fails open, and soon."""

    def __init__(
        self,
        handle: DeploymentHandle,
        *,
        deadline_s: float = DEADLINE_S,
        pause_s: float = PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handle = handle
        self._clock = clock
        self._deadline_s = deadline_s
        self._pause_s = pause_s
        self._paused_until = 0.0
        self._writes: set[asyncio.Task[None]] = set()

    async def get(self, key: str) -> dict[str, Any] | None:
        """What is cached under `key`; None also where the cache fails or hangs."""
        return await self._call("get", key)

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Write in the background; nobody waits for it."""
        task = asyncio.get_running_loop().create_task(self._call("put", key, value))
        self._writes.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._writes.discard)

    async def _call(self, method: str, *args: Any) -> Any:
        if self._clock() < self._paused_until:
            return None
        try:
            return await asyncio.wait_for(self._handle.options(method_name=method).remote(*args), self._deadline_s)
        except Exception as error:  # a dead replica, a full queue, a timeout: all mean "without the cache"
            self._paused_until = self._clock() + self._pause_s
            logger.warning(f"response cache: {method} failed ({type(error).__name__}); going on without it for a while")
            return None
