"""The end of an application: what was accepted is finished, what comes is refused with a 503, then it can go.

Serve does the same by itself for one replica among others: it routes no more to a replica that is to go, and lets it
finish. Only an application that ends altogether has nobody to route to, and Serve's proxy would answer with a 404.
"""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from app.serving.api_errors import refuse
from app.serving.messages import SHUTTING_DOWN, Refusal

RETRY_AFTER_S = 5
ENDING = Refusal(503, "this server is shutting down", code=SHUTTING_DOWN, retry_after_s=RETRY_AFTER_S)


class Doorkeeper:
    """Counts the requests that are being answered, and lets none in any more once `close` was called."""

    def __init__(self) -> None:
        self._num_open = 0
        self._is_closed = False
        self._is_empty = asyncio.Event()

    async def close(self) -> None:
        """Refuse what comes from now on, and wait for what was let in."""
        self._is_closed = True
        while self._num_open:
            self._is_empty.clear()
            await self._is_empty.wait()

    def enter(self) -> bool:
        if not self._is_closed:
            self._num_open += 1
        return not self._is_closed

    def leave(self) -> None:
        self._num_open -= 1
        if not self._num_open:
            self._is_empty.set()


class RefuseWhenEnding:
    """ASGI middleware: each request passes `door` on its way in and out."""

    def __init__(self, app: ASGIApp, *, door: Doorkeeper) -> None:
        self.app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if not self._door.enter():
            return await refuse(ENDING)(scope, receive, send)
        try:
            await self.app(scope, receive, send)
        finally:
            self._door.leave()
