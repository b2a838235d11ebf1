"""One line in the log for each HTTP request: what was asked for, what came of it and how long it took.

What was said is in no log: neither prompts nor answers, and of a key only the beginning of its hash. With `log.format:
json` each field is one of the JSON object, beside those that Serve adds: the request's id, application, replica.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.messages import INTERNAL_ERROR

logger = logging.getLogger("ray.serve")

CLIENT_LEFT = 499
"""nginx's status for a request whose client went away, which was answered with none."""
_KEY_LENGTH = 12


@dataclass
class RequestRecord:
    """What those who work on a request note of it."""

    model: str | None = None
    """That answered; a name that does not exist stays out."""
    cache: str | None = None
    """`hit`, or `miss` for an answer that was computed."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    key: str | None = None
    error: str | None = None
    """The error's code, also where it came within a stream."""


current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)


def note(**fields: Any) -> None:
    """Set fields of the record of the request that this runs for; nothing where there is none."""
    if (record := current_record.get()) is not None:
        for name, value in fields.items():
            assert name in RequestRecord.__dataclass_fields__, name
            setattr(record, name, value)


def note_key(sha256: str) -> None:
    note(key=sha256[:_KEY_LENGTH])


class LogRequests:
    """ASGI middleware: the outermost, so that its line counts everything."""

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        record, start = RequestRecord(), self._clock()
        status = first_byte_s = None

        async def seen_send(message: Message) -> None:
            nonlocal status, first_byte_s
            if message["type"] == "http.response.start":
                status = message["status"]
            elif first_byte_s is None:
                first_byte_s = self._clock() - start
            await send(message)

        token = current_record.set(record)
        try:
            await self.app(scope, receive, seen_send)
        except asyncio.CancelledError:
            status = CLIENT_LEFT
            raise
        except Exception:
            status, record.error = status or 500, record.error or INTERNAL_ERROR.code
            raise
        finally:
            current_record.reset(token)
            _write(scope, record, status or CLIENT_LEFT, first_byte_s, self._clock() - start)


def _write(scope: Scope, record: RequestRecord, status: int, first_byte_s: float | None, latency_s: float) -> None:
    route = getattr(scope.get("route"), "path", None)  # not the path, which may hold whatever a client likes
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": route,
        "status": status,
        "latency_ms": round(latency_s * 1000, 1),
        "first_byte_ms": None if first_byte_s is None else round(first_byte_s * 1000, 1),
        **asdict(record),
    }
    told = " ".join(f"{name}={value}" for name, value in asdict(record).items() if value is not None)
    line = f"{scope['method']} {route or '-'} {status} {latency_s * 1000:.1f}ms {told}".rstrip()
    # As Serve's own access log, which this stands for: into the replica's file, and not to whoever started it.
    logger.info(line, extra=fields | {"log_to_stderr": False})
