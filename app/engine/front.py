"""The engine for servers: called from event loops, stepped by one thread of its own.

Calls reach the engine through an inbox between two steps, so that no event loop ever waits for a step to finish, and
the engine itself needs no lock. Events travel back to the loop that asked for them, several at once where there are
many: it is this thread that holds them back, since a loop that had to would wake up for each.
"""

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field

from app.engine.deltas import Variant
from app.engine.engine import Engine, Stats
from app.engine.events import Event
from app.engine.sampling import Sampling
from app.methods.delta import Delta

logger = logging.getLogger(__name__)


class GenerationFailed(Exception):
    """The step that this request was in raised an exception; other requests can follow."""


class EngineStopped(Exception):
    """The engine was shut down."""


@dataclass(eq=False)
class _Call:
    """One `generate` call: where its events go, and its id once the engine has it."""

    ids: Sequence[int]
    sampling: Sampling
    delta: str | None
    priority: int
    loop: asyncio.AbstractEventLoop
    batches: asyncio.Queue[list[Event] | Exception] = field(default_factory=asyncio.Queue)
    held: list[Event] = field(default_factory=list)
    """Not sent yet."""
    due_at: float = 0.0
    """When the next events may be sent; the first may at once."""
    request_id: int | None = None
    unfinished: int = field(init=False)
    """Answers that go on."""

    def __post_init__(self) -> None:
        self.unfinished = self.sampling.n


_Delivery = tuple[_Call, list[Event] | Exception]


class EngineFront:
    """`batches_per_s`, of all requests together, is how many batches of events are sent: each request's first event at
    once, and its last ones; those between as seldom as that takes, but every `longest_pause_s`. None: all at once."""

    def __init__(
        self,
        engine: Engine,
        *,
        name: str = "engine",
        batches_per_s: float | None = None,
        longest_pause_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._batches_per_s = batches_per_s
        self._longest_pause_s = longest_pause_s
        self._clock = clock
        self._inbox: deque[Callable[[], None]] = deque()
        self._inbox_lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._stopped = False
        self._calls: dict[int, _Call] = {}
        self._holding: dict[int, _Call] = {}
        """Those of `_calls` with events that are held back."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, delta: str | None = None, *, priority: int = 0
    ) -> AsyncGenerator[Event, None]:
        """The events of `batches`, one by one."""
        async with aclosing(self.batches(ids, sampling, delta, priority=priority)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def batches(
        self, ids: Sequence[int], sampling: Sampling, delta: str | None = None, *, priority: int = 0
    ) -> AsyncGenerator[list[Event], None]:
        """Events of one request as they come; the last of each of its `n` answers has a finish reason.

        Closing the generator or cancelling the task that reads it aborts the request. Read it under
        `contextlib.aclosing`, else Python closes it whenever it likes.

        Raises:
            InvalidRequest, UnknownDelta, QueueFull: as `Engine.add_request`.
            GenerationFailed: a step raised an exception.
            EngineStopped: `shutdown` was called.
        """
        call = _Call(ids, sampling, delta, priority, asyncio.get_running_loop())
        if not self._post(lambda: self._add(call)):
            raise _stopped()
        unfinished = sampling.n
        try:
            while unfinished:
                batch = await call.batches.get()
                if isinstance(batch, Exception):
                    unfinished = 0
                    raise batch
                unfinished -= sum(event.finish_reason is not None for event in batch)
                yield batch
        finally:
            if unfinished:
                self._post(lambda: self._abort(call))

    def load_delta(self, delta: Delta, *, pin: bool = False) -> Variant:
        """Load `delta` beside running requests. It waits for the engine's thread: an event loop calls it in another.

        Raises:
            UserError, DeltasFull: as `Engine.add_delta`.
            EngineStopped: `shutdown` was called.
        """
        variant = self._engine.prepare_delta(delta)
        self._on_engine(lambda: self._engine.add_delta(variant, pin=pin))
        return variant

    def unpin_delta(self, delta_hash: str) -> None:
        """Let it go, once no request uses it and another needs its room; it may have gone already."""
        self._on_engine(lambda: self._engine.deltas.unpin(delta_hash))

    def stats(self) -> Stats:
        """Safe from any thread; may be a step old."""
        return self._engine.stats()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def shutdown(self, *, timeout_s: float = 10.0) -> None:
        """End the thread after its step; open calls raise `EngineStopped`."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)

    # --- on any thread ---

    def _post(self, action: Callable[[], None]) -> bool:
        """Have the engine's thread call `action` before its next step; False if there is no thread any more."""
        with self._inbox_lock:
            if self._stopped:
                return False
            self._inbox.append(action)
        self._wake.set()
        return True

    def _on_engine(self, action: Callable[[], object]) -> None:
        """Run `action` between two steps, and wait for its end."""
        done: Future[None] = Future()

        def act() -> None:
            try:
                action()
            except Exception as error:  # the caller's to handle
                done.set_exception(error)
            else:
                done.set_result(None)

        if not self._post(act):
            raise _stopped()
        done.result()

    # --- on the engine's thread ---

    def _run(self) -> None:
        while not self._stopping:
            if not self._engine.has_work:
                self._wake.wait()
            self._wake.clear()
            self._empty_inbox()
            self._step()
        with self._inbox_lock:
            self._stopped = True
        self._empty_inbox()
        self._fail_all(_stopped())

    def _empty_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:  # whatever a step raises must end its requests, not the thread
            logger.exception("a generation step failed; its requests are dropped")
            self._fail_all(GenerationFailed(f"generation failed: {type(error).__name__}: {error}"))
            return
        now, pause_s = self._clock(), self._pause_s()
        by_loop: dict[asyncio.AbstractEventLoop, list[_Delivery]] = defaultdict(list)
        for event in events:
            call = self._holding[event.request_id] = self._calls[event.request_id]
            call.held.append(event)
            if event.finish_reason is not None:
                call.unfinished -= 1
                call.due_at = now
        for request_id, call in list(self._holding.items()):  # also of those who gave way and have nothing new
            if not call.unfinished:
                del self._calls[request_id]
            if now >= call.due_at:
                by_loop[call.loop].append((call, call.held))
                call.held, call.due_at = [], now + pause_s
                del self._holding[request_id]
        for loop, deliveries in by_loop.items():
            self._deliver(loop, deliveries)

    def _pause_s(self) -> float:
        """Between two batches of one request."""
        if self._batches_per_s is None:
            return 0.0
        return min(self._longest_pause_s, self._engine.num_running / self._batches_per_s)

    def _add(self, call: _Call) -> None:
        try:
            call.request_id = self._engine.add_request(call.ids, call.sampling, call.delta, priority=call.priority)
        except Exception as error:  # the caller's to handle, in the caller's loop
            self._deliver(call.loop, [(call, error)])
        else:
            self._calls[call.request_id] = call

    def _abort(self, call: _Call) -> None:
        if call.request_id is not None and call.request_id in self._calls:
            del self._calls[call.request_id]
            self._holding.pop(call.request_id, None)
            self._engine.abort(call.request_id)

    def _deliver(self, loop: asyncio.AbstractEventLoop, deliveries: Sequence[_Delivery]) -> None:
        """One wake-up of the loop for all its requests' events."""

        def put() -> None:
            for call, batch in deliveries:
                call.batches.put_nowait(batch)

        try:
            loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is closed, so nobody reads these requests any more
            for call, _ in deliveries:
                self._abort(call)

    def _fail_all(self, error: Exception) -> None:
        self._engine.abort_all()
        calls, self._calls = list(self._calls.values()), {}
        self._holding = {}
        for call in calls:
            self._deliver(call.loop, [(call, call.held), (call, error)] if call.held else [(call, error)])


def _stopped() -> EngineStopped:
    return EngineStopped("the engine has been shut down")
