import asyncio
from contextlib import aclosing

import pytest

from app.caching.single_flight import SingleFlight


class Source:
    """Gives `items`, one for each `go`; counts how often it was started and whether it was left."""

    def __init__(self, *items, error: Exception | None = None) -> None:
        self.items, self.error = items, error
        self.starts = self.closed = 0
        self.go = asyncio.Semaphore(0)

    async def __call__(self):
        self.starts += 1
        try:
            for item in self.items:
                await self.go.acquire()
                yield item
            if self.error:
                raise self.error
        finally:
            self.closed += 1


async def read(flights: SingleFlight, source: Source, key: str = "a") -> list[tuple[object, bool]]:
    async with aclosing(flights.stream(key, source)) as items:
        return [item async for item in items]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_hundred_equal_requests_compute_one():
    async def run():
        flights, source = SingleFlight(), Source(1, 2, 3)
        tasks = [asyncio.create_task(read(flights, source)) for _ in range(100)]
        other = asyncio.create_task(read(flights, second := Source("x"), "b"))
        for _ in range(3):
            source.go.release()
        second.go.release()
        first, *others = await asyncio.gather(*tasks)
        assert first == [(1, False), (2, False), (3, False)]
        assert all(items == [(1, True), (2, True), (3, True)] for items in others)
        assert await other == [("x", False)]
        assert source.starts == second.starts == 1
        source.go.release()
        source.items = (4,)
        assert await read(flights, source) == [(4, False)], "what has ended is not given again"

    asyncio.run(run())


def test_who_comes_late_gets_the_beginning_too():
    async def run():
        flights, source = SingleFlight(), Source(1, 2)
        first = asyncio.create_task(read(flights, source))
        source.go.release()
        await settle()
        late = asyncio.create_task(read(flights, source))
        await settle()
        source.go.release()
        assert await first == [(1, False), (2, False)] and await late == [(1, True), (2, True)]

    asyncio.run(run())


def test_the_first_may_leave_and_the_last_to_leave_ends_it():
    async def run():
        flights, source = SingleFlight(), Source(1, 2)
        first, second = (asyncio.create_task(read(flights, source)) for _ in range(2))
        await settle()
        first.cancel()
        source.go.release()
        await settle()
        assert not source.closed
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await settle()
        assert source.closed == 1
        anew = asyncio.create_task(read(flights, source))
        for _ in range(2):
            source.go.release()
        assert [item for item, _ in await anew] == [1, 2] and source.starts == 2

    asyncio.run(run())


def test_an_error_reaches_all_and_is_not_kept():
    async def run():
        flights, source = SingleFlight(), Source(1, error=ValueError("no"))
        tasks = [asyncio.create_task(read(flights, source)) for _ in range(3)]
        await settle()
        source.go.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, ValueError) for result in results) and source.starts == 1
        source.error = None
        source.go.release()
        assert await read(flights, source) == [(1, False)]

    asyncio.run(run())


def test_one_result_is_shared_too():
    async def run():
        flights, calls = SingleFlight(), []

        async def compute():
            calls.append(1)
            await asyncio.sleep(0.01)
            return "answer"

        results = await asyncio.gather(*(flights.result("a", compute) for _ in range(50)))
        assert results == [("answer", False), *[("answer", True)] * 49] and len(calls) == 1

        async def fail():
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await flights.result("a", fail)

    asyncio.run(run())
