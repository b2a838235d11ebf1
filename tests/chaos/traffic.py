"""Requests without end, as from behind a load balancer: what one node breaks is asked again at another."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

TRIES = 6
WAIT_S, CONNECT_WITHIN_S = 20.0, 3.0
"""For an answer. A host without power does not even close its connections."""


@dataclass(frozen=True)
class Request:
    body: dict[str, Any]
    path: str = "/v1/completions"
    method: str = "POST"


@dataclass
class Asked:
    """One request, and what each try of it met: a status, or the name of what broke the connection."""

    began: float
    met: list[int | str] = field(default_factory=list)
    ended: float = 0.0
    text: str = ""
    """Of a completion."""

    @property
    def is_answered(self) -> bool:
        return self.met[-1] == 200

    @property
    def num_refused(self) -> int:
        """Times that the server said to come later, before it had accepted anything."""
        return sum(status in (429, 503) for status in self.met)

    @property
    def num_broken(self) -> int:
        return len(self.met) - self.is_answered - self.num_refused

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Traffic:
    """Within the block, `clients` ask one after the other for whole answers, `request(number)` each time.

    A balancer as plain as they come: the nodes in turn, without those that broke a request and whose /healthz has not
    answered since; and each request tried `TRIES` times at most.
    """

    def __init__(
        self, urls: Sequence[str], request: Callable[[int], Request], *, clients: int = 6, pause_s: float = 0.0
    ) -> None:
        self.asked: list[Asked] = []
        self._urls, self._request, self._clients, self._pause_s = list(urls), request, clients, pause_s
        self._turn, self._numbers = itertools.count(), itertools.count(time.time_ns() % 10**9)
        self._left_out: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(WAIT_S * TRIES)
        assert not self._thread.is_alive(), "a request was left without an answer"

    def go_on(self, seconds: float) -> None:
        """So long, and until three more were answered that had begun after it."""
        time.sleep(seconds)
        moment = time.monotonic()
        while sum(asked.is_answered for asked in list(self.asked) if asked.began > moment) < 3:
            assert time.monotonic() - moment < 300, f"no answers any more; the last: {self.asked[-3:]}"
            time.sleep(0.1)

    def figures(self, fault_at: float) -> dict[str, Any]:
        """`seconds` from the fault until the last request that met anything but its answer, or waited for five
        seconds, had ended."""
        late = [a.ended - fault_at for a in self.asked if a.ended > fault_at and (len(a.met) > 1 or a.seconds > 5)]
        return {
            "requests": len(self.asked),
            "lost": sum(not asked.is_answered for asked in self.asked),
            "broken": sum(asked.num_broken for asked in self.asked),
            "refused": sum(asked.num_refused for asked in self.asked),
            "longest_s": max(asked.seconds for asked in self.asked),
            "seconds": max(late, default=0.0),
        }

    async def _run(self) -> None:
        timeout = httpx.Timeout(WAIT_S, connect=CONNECT_WITHIN_S)
        async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
            await asyncio.gather(self._look_again(client), *(self._ask_on(client) for _ in range(self._clients)))

    async def _look_again(self, client: httpx.AsyncClient) -> None:
        """Take nodes in that answer again."""
        while not self._stop.is_set():
            for url in list(self._left_out):
                with suppress(httpx.TransportError):
                    if (await client.get(f"{url}/healthz", timeout=CONNECT_WITHIN_S)).is_success:
                        self._left_out.discard(url)
            await asyncio.sleep(0.5)

    async def _ask_on(self, client: httpx.AsyncClient) -> None:
        while not self._stop.is_set():
            asked = Asked(time.monotonic())
            request = self._request(next(self._numbers))
            for _ in range(TRIES):
                url = self._next_url()
                try:
                    response = await client.request(request.method, url + request.path, json=request.body)
                except httpx.TransportError as error:
                    asked.met.append(type(error).__name__)
                else:
                    asked.met.append(response.status_code if _is_whole(response) else "cut off")
                if asked.is_answered:
                    asked.text = _text(response)
                    break
                self._left_out.add(url)
                await asyncio.sleep(0.2)
            asked.ended = time.monotonic()
            self.asked.append(asked)
            await asyncio.sleep(self._pause_s)

    def _next_url(self) -> str:
        good = [url for url in self._urls if url not in self._left_out] or self._urls
        return good[next(self._turn) % len(good)]


def _is_whole(response: httpx.Response) -> bool:
    return not _is_stream(response) or response.text.endswith("data: [DONE]\n\n")


def _is_stream(response: httpx.Response) -> bool:
    return response.headers.get("content-type", "").startswith("text/event-stream")


def _text(response: httpx.Response) -> str:
    choices = [] if _is_stream(response) else response.json().get("choices", [])
    return str(choices[0].get("text", "")) if choices else ""
