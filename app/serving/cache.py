"""The cache deployment, and the client that makes sure that it can only ever help."""

import time
from collections.abc import Callable
from typing import Any

from ray.serve.handle import DeploymentHandle

from app.caching.backends import make_backend
from app.caching.exact import ResponseCache
from app.config import CacheConfig
from app.serving.guarded import PAUSE_S, GuardedHandle, Unavailable

DEADLINE_S = 0.25
"""A cache that takes longer to answer than this is a cache that missed."""


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
        self._cache = GuardedHandle(handle, name="response cache", deadline_s=deadline_s, pause_s=pause_s, clock=clock)

    async def get(self, key: str) -> dict[str, Any] | None:
        """What is cached under `key`; None also where the cache fails or hangs."""
        return await self._call("get", key)

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Write in the background; nobody waits for it."""
        self._cache.in_background(self._call("put", key, value))

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            return await self._cache.call(method, *args)
        except Unavailable:
            return None
