"""The wire between a run's driver and its workers: metrics one way, the wish to stop the other.

An actor on the driver's node, where no other node's loss can take it away.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class _ChannelActor:
    """Async, so that the workers' waiting blocks nobody."""

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._taken: list[Any] = []
        self._stop = asyncio.Event()

    async def put(self, item: Any) -> int:
        self._items.append(item)
        return len(self._taken) + len(self._items)

    async def take(self) -> list[Any]:
        self._taken, self._items = self._items, []
        return self._taken

    async def ask_to_stop(self) -> None:
        self._stop.set()

    async def until_asked_to_stop(self) -> None:
        await self._stop.wait()

    async def until_closed(self) -> None:
        await asyncio.Event().wait()

    async def ping(self) -> None:
        pass


class Channel:
    """Both ends; sent to the workers within what they are told to do."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # What it is asked ten times a second would fill the memory of the head, which keeps the events of all tasks.
        options = {"num_cpus": 0, "scheduling_strategy": here, "enable_task_events": False}
        self._actor = ray.remote(_ChannelActor).options(**options).remote()

    # --- the driver's end ---

    def take(self) -> list[Any]:
        """All that was sent since the last call, in order; whoever calls again has dealt with what that returned."""
        return ray.get(self._actor.take.remote())

    def ask_to_stop(self) -> None:
        with contextlib.suppress(ActorDiedError):  # closed
            ray.get(self._actor.ask_to_stop.remote())

    def close(self) -> None:
        """Workers that are still there end at once."""
        ray.kill(self._actor)

    # --- the other end ---

    def send(self, item: Any) -> int:
        """Returns how many items the driver may not have dealt with, this one among them."""
        return ray.get(self._actor.put.remote(item))

    def watch(self) -> Callable[[], bool]:
        """Whether the driver has asked to stop, known without a call; the process ends when the channel is closed.

        A thread waits for the one answer, so that asking costs a step nothing.
        """
        stop = threading.Event()

        def wait() -> None:
            try:
                _answer(self._actor.until_asked_to_stop)
                stop.set()
                _answer(self._actor.until_closed)
            except ActorDiedError:
                os._exit(1)  # a collective call that waits for another worker cannot be ended otherwise

        threading.Thread(target=wait, name="stop", daemon=True).start()
        return stop.is_set

    def is_closed(self) -> bool:
        try:
            _answer(self._actor.ping)
        except ActorDiedError:
            return True
        return False


def _answer(method: Any) -> None:
    """Wait for an actor's answer, also through a network that fails for a while."""
    while True:
        try:
            return ray.get(method.remote())
        except ActorUnavailableError:
            time.sleep(1)
