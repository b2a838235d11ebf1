"""Requests without end, from clients that never try again, to see whom a fault hurts."""

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx


@dataclass
class Outcome:
    """What became of one request."""

    kind: str
    began: float
    ended: float = 0.0
    status: int | None = None
    """None: the connection broke before one came."""
    text: str = ""
    num_pieces: int = 0
    error: str | None = None
    """The code in OpenAI's error object, in place of an answer or at a stream's end; else what broke."""
    is_complete: bool = False

    def spans(self, moment: float) -> bool:
        return self.began < moment < self.ended


Body = dict[str, Any] | Callable[[int], dict[str, Any]]


class Load:
    """Within the block, `clients` of each kind ask one after the other; `kinds` gives a kind's path and its body, or
    what makes one of a number that is another each time."""

    def __init__(
        self,
        url: str,
        kinds: Mapping[str, tuple[str, Body]],
        *,
        clients: int = 2,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._url, self._kinds, self._clients, self._headers = url, kinds, clients, dict(headers or {})
        self._numbers = itertools.count(time.time_ns() % 10**9)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run_here, daemon=True)
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive(), "a request was left without an answer"
        if self._failure is not None:
            raise self._failure

    def wait_for(self, condition: Callable[[list[Outcome]], bool], *, within_s: float = 120) -> None:
        until(lambda: condition(list(self.outcomes)), within_s=within_s)

    def go_on(self, seconds: float = 3.0) -> None:
        """Until each kind has been asked for and answered once more, after so long."""
        moment = time.monotonic() + seconds
        self.wait_for(lambda outcomes: {o.kind for o in outcomes if o.began > moment} == set(self._kinds))

    def _run_here(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception as error:  # told where the block ends
            self._failure = error

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=90, trust_env=False, limits=limits, headers=self._headers
        ) as client:
            await asyncio.gather(*(self._ask(client, kind) for kind in self._kinds for _ in range(self._clients)))

    async def _ask(self, client: httpx.AsyncClient, kind: str) -> None:
        path, body = self._kinds[kind]
        while not self._stop.is_set():
            outcome = Outcome(kind, time.monotonic())
            asked = body if isinstance(body, dict) else body(next(self._numbers))
            try:
                async with client.stream("POST", path, json=asked) as response:
                    outcome.status = response.status_code
                    if response.headers.get("content-type", "").startswith("text/event-stream"):
                        await _read_stream(response, outcome)
                    else:
                        _read_whole(await response.aread(), outcome)
            except (httpx.HTTPError, json.JSONDecodeError) as error:
                outcome.error = type(error).__name__
            outcome.ended = time.monotonic()
            self.outcomes.append(outcome)
            if not outcome.is_complete:
                await asyncio.sleep(0.2)


async def _read_stream(response: httpx.Response, outcome: Outcome) -> None:
    async for line in response.aiter_lines():
        if not line:
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            outcome.is_complete = True
        elif "error" in (event := json.loads(data)):
            outcome.error = event["error"]["code"]
        else:
            outcome.num_pieces += 1
            outcome.text += "".join(choice.get("text", "") for choice in event["choices"])


def _read_whole(content: bytes, outcome: Outcome) -> None:
    try:
        answer = json.loads(content)
    except json.JSONDecodeError:
        outcome.error = content.decode(errors="replace")[:200]
        return
    outcome.is_complete = outcome.status == 200
    if not outcome.is_complete:
        outcome.error = answer["error"]["code"]
    elif "choices" in answer:
        outcome.text = answer["choices"][0]["text"]


def until(condition: Callable[[], Any], *, within_s: float = 120) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
