"""Equal requests at the same time share one computation. Knows no models and no HTTP."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any


class _Flight:
    """A stream that runs, and all that has come of it so far."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.is_done = False
        self.error: BaseException | None = None
        self.num_waiting = 0
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        await self._changed.wait()

    def tell(self) -> None:
        """Wake all who wait; the next ones wait for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()


class SingleFlight:
    """By key, what is being computed. It ends, and is cancelled, once nobody waits for it any longer."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight] = {}

    async def stream(
        self, key: str, source: Callable[[], AsyncGenerator[Any, None]]
    ) -> AsyncGenerator[tuple[Any, bool], None]:
        """Items of `source`, or of an equal one that runs, from its first on; and whether they are another's.

        An exception of the source reaches all who wait for it.
        """
        flight = self._flights.get(key)
        is_shared = flight is not None
        if flight is None:
            flight = self._flights[key] = _Flight()
            flight.task = asyncio.get_running_loop().create_task(self._run(key, flight, source))
        flight.num_waiting += 1
        position = 0
        try:
            while True:
                while position < len(flight.items):
                    position += 1
                    yield flight.items[position - 1], is_shared
                if flight.is_done:
                    if flight.error is not None:
                        raise flight.error
                    return
                await flight.changed()
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting and not flight.is_done:
                self._forget(key, flight)  # who comes now starts anew
                assert flight.task is not None
                flight.task.cancel()

    async def result(self, key: str, compute: Callable[[], Awaitable[Any]]) -> tuple[Any, bool]:
        """The same for a computation with one result."""

        async def source() -> AsyncGenerator[Any, None]:
            yield await compute()

        async with aclosing(self.stream(key, source)) as items:
            return await anext(items)

    async def _run(self, key: str, flight: _Flight, source: Callable[[], AsyncGenerator[Any, None]]) -> None:
        try:
            async with aclosing(source()) as items:
                async for item in items:
                    flight.items.append(item)
                    flight.tell()
        except Exception as error:
            flight.error = error
        finally:
            self._forget(key, flight)
            flight.is_done = True
            flight.tell()

    def _forget(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
