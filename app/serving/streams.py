"""Several asynchronous streams read as one; many small items of a stream sent as fewer."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def merge(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """Items as they come. One stream's exception ends them all, and so does closing this one."""
    done = object()
    queue: asyncio.Queue[object] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait(item)
            queue.put_nowait(done)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    num_open = len(tasks)
    try:
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is done:
                num_open -= 1
            else:
                yield item  # type: ignore[misc]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def coalesced(
    stream: AsyncGenerator[Item, None],
    *,
    joined: Callable[[Item, Item], Item | None],
    is_urgent: Callable[[Item], bool],
    interval_s: Callable[[], float],
) -> AsyncGenerator[Item, None]:
    """The first item at once, then what has come since, not more often than every `interval_s`; urgent ones at once.

    `joined` makes one item of two neighbours, or None where they must stay two. Closing this closes the stream.
    """
    items = merge([stream])
    pending: list[Item] = []
    loop = asyncio.get_running_loop()
    due_at = loop.time()
    next_item: asyncio.Task[Item] | None = None
    async with aclosing(items):
        try:
            while True:
                if next_item is None:
                    next_item = loop.create_task(anext(items))
                wait_s = max(0.0, due_at - loop.time()) if pending else None
                await asyncio.wait([next_item], timeout=wait_s)
                is_over = False
                if next_item.done():
                    finished, next_item = next_item, None
                    try:
                        _append(pending, finished.result(), joined)
                    except StopAsyncIteration:
                        is_over = True
                    except Exception:
                        for item in pending:
                            yield item
                        raise
                if pending and (is_over or is_urgent(pending[-1]) or loop.time() >= due_at):
                    ready, pending = pending, []
                    due_at = loop.time() + interval_s()
                    for item in ready:
                        yield item
                if is_over:
                    return
        finally:
            if next_item is not None:
                next_item.cancel()
                await asyncio.gather(next_item, return_exceptions=True)


def _append(pending: list[Item], item: Item, joined: Callable[[Item, Item], Item | None]) -> None:
    if pending and (both := joined(pending[-1], item)) is not None:
        pending[-1] = both
    else:
        pending.append(item)
