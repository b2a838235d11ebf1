"""Another deployment's handle, for what a request can do without: a deadline, and a pause after a failure."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")

PAUSE_S = 5.0
"""After a failure requests go without the deployment for so long, rather than each wait for the deadline."""


class Unavailable(Exception):
    """It failed just now, or a moment ago."""


class GuardedHandle:
    def __init__(
        self,
        handle: DeploymentHandle,
        *,
        name: str,
        deadline_s: float,
        pause_s: float = PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handle = handle
        self._name = name
        self._deadline_s = deadline_s
        self._pause_s = pause_s
        self._clock = clock
        self._paused_until = float("-inf")
        self._tasks: set[asyncio.Task[Any]] = set()

    async def call(self, method: str, *args: Any) -> Any:
        """
        Raises:
            Unavailable: a dead replica, a full queue, no answer in time; the first of them is told in the log.
        """
        if self._clock() < self._paused_until:
            raise Unavailable
        try:
            return await asyncio.wait_for(self._handle.options(method_name=method).remote(*args), self._deadline_s)
        except Exception as error:
            self._paused_until = self._clock() + self._pause_s
            logger.warning(f"{self._name}: {method} failed ({type(error).__name__}); going on without it for a while")
            raise Unavailable from None

    def in_background(self, work: Any) -> None:
        """Run the coroutine `work`; nobody waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
