"""Requests without end, as from behind a load balancer: what one node breaks is asked again at another."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

TRIES = 6
WAIT_S, CONNECT_WITHIN_S = 20.0, 3.0
"""For an answer. A host without power does not even close its connections."""


@dataclass
class Asked:
    """One request, and what each try of it met: a status, or the name of what broke the connection."""

    began: float
    met: list[int | str] = field(default_factory=list)
    ended: float = 0.0
    text: str = ""

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
    """Within the block, `clients` ask one after the other for whole answers, `body(number)` each time.

    A balancer as plain as they come: the nodes in turn, without those that broke a request and whose /healthz has not
    answered since; and each request tried `TRIES` times at most.
    """

    def __init__(
        self, urls: Sequence[str], body: Callable[[int], Mapping[str, Any]], *, path: str = "/v1/completions",
        clients: int = 6,
    ) -> None:  # fmt: skip
        self.asked: list[Asked] = []
        self._urls, self._body, self._path, self._clients = list(urls), body, path, clients
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
            body = self._body(next(self._numbers))
            for _ in range(TRIES):
                url = self._next_url()
                try:
                    response = await client.post(url + self._path, json=body)
                except httpx.TransportError as error:
                    asked.met.append(type(error).__name__)
                else:
                    asked.met.append(response.status_code)
                if asked.is_answered:
                    asked.text = response.json()["choices"][0]["text"]
                    break
                self._left_out.add(url)
                await asyncio.sleep(0.2)
            asked.ended = time.monotonic()
            self.asked.append(asked)

    def _next_url(self) -> str:
        good = [url for url in self._urls if url not in self._left_out] or self._urls
        return good[next(self._turn) % len(good)]
