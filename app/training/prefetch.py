"""The next batch is prepared while this one trains."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """`items`, each made in a thread of its own while the caller works on the one before; what one raises comes when
    it is asked for. Where the caller stops early, one item more has been taken than used."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="next batch")
    try:
        ahead = pool.submit(next, items, _END)
        while (item := ahead.result()) is not _END:
            ahead = pool.submit(next, items, _END)
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # it may be waiting for data that nobody will send any more
