"""Ctrl-C and SIGTERM as a wish to stop: the first is noted, the second ends at once. Knows no Ray."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ONE_WISH_S = 0.5
"""Signals within this time are one: `timeout` sends its signal to the process and to its group."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(on_first: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Yields whether a signal has come. For the block, the first calls `on_first`; the second raises KeyboardInterrupt.

    Elsewhere than in the main thread, which alone gets signals, nothing changes.
    """
    stop, first_at = threading.Event(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first_at
        if not stop.is_set():
            first_at = time.monotonic()
            stop.set()
            on_first()
        elif time.monotonic() - first_at > ONE_WISH_S:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield stop.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """Raised on every worker once the step that ran when the stop came is saved."""

    def __init__(self, step: int, total_steps: int) -> None:
        super().__init__(step, total_steps)
        self.step, self.total_steps = step, total_steps
