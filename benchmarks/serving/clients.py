"""Clients of a completions endpoint: what each saw of its answer, and when."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

TIMEOUT_S = 900


@dataclass
class Answer:
    status: int = 0
    """Of HTTP; 0 where there was no response at all."""
    error: str = ""
    tokens: int = 0
    started: float = 0.0
    """On the clock that all answers of a run share, in seconds; so are the next two."""
    first: float = 0.0
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """From one event with text to the next."""

    @property
    def is_complete(self) -> bool:
        return self.status == 200 and not self.error


async def closed_loop(
    url: str, bodies: Sequence[dict[str, Any]], *, num_clients: int, key: str | None = None
) -> list[Answer]:
    """All `bodies`, in order, by clients of which each sends its next request when its last has been answered."""
    left = iter(bodies)
    answers: list[Answer] = []
    async with _session(key) as session:

        async def client() -> None:
            for body in left:
                answers.append(await ask(session, url, body))

        await asyncio.gather(*(client() for _ in range(num_clients)))
    return answers


async def open_loop(url: str, bodies: Sequence[dict[str, Any]], *, per_s: float) -> list[Answer]:
    """All `bodies`, `per_s` of them a second, whether or not those before are answered."""
    async with _session() as session:
        start = time.perf_counter()

        async def at_its_time(number: int, body: dict[str, Any]) -> Answer:
            await asyncio.sleep(max(0.0, start + number / per_s - time.perf_counter()))
            return await ask(session, url, body)

        return list(await asyncio.gather(*(at_its_time(number, body) for number, body in enumerate(bodies))))


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    answer = Answer(started=time.perf_counter())
    try:
        async with session.post(url, json=body) as response:
            answer.status = response.status
            if response.status != 200:
                answer.error = (await response.text())[:300]
            elif body.get("stream"):
                await _read_stream(response, answer)
            else:
                answer.tokens = (await response.json())["usage"]["completion_tokens"]
                answer.first = time.perf_counter()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.perf_counter()
    return answer


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer) -> None:
    last, is_done = 0.0, False
    async for data in _events(response):
        if data == "[DONE]":
            is_done = True
            break
        event = json.loads(data)
        if "error" in event:
            answer.error = event["error"]["message"]
            return
        if event.get("usage"):
            answer.tokens = event["usage"]["completion_tokens"]
        if event.get("choices"):
            now = time.perf_counter()
            if answer.first:
                answer.gaps.append(now - last)
            else:
                answer.first = now
            last = now
    if not is_done:
        answer.error = "the stream ended without [DONE]"


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for line in response.content:
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()


def _session(key: str | None = None) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers=None if key is None else {"Authorization": f"Bearer {key}"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        read_bufsize=2**20,
    )


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Throughput over the whole run, and quantiles over what was answered; seconds."""
    complete = [answer for answer in answers if answer.is_complete]
    seconds = max(answer.ended for answer in answers) - min(answer.started for answer in answers)
    tokens = sum(answer.tokens for answer in complete)
    outcomes = Counter("complete" if a.is_complete else str(a.status or "no response") for a in answers)
    return {
        "requests": len(answers),
        "outcomes": dict(outcomes),
        "errors": sorted({answer.error for answer in answers if answer.error and answer.status != 429})[:5],
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "requests_per_s": len(complete) / seconds,
        "first_token_s": quantiles([answer.first - answer.started for answer in complete]),
        "between_events_s": quantiles([gap for answer in complete for gap in answer.gaps]),
        "request_s": quantiles([answer.ended - answer.started for answer in complete]),
    }


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {name: ordered[min(len(ordered) - 1, int(part * len(ordered)))] for name, part in _QUANTILES.items()}


_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
