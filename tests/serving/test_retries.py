"""What the ingress makes of replicas that end, over handles whose replicas do; tests/serving/test_operations.py kills
real ones."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError

from app.config import ApplicationConfig
from app.serving import answering as answering_module
from app.serving.answering import Answering
from app.serving.api_errors import ApiError
from app.serving.messages import (
    SHUTTING_DOWN,
    Choice,
    Completion,
    GenerateRequest,
    Piece,
    PromptInfo,
    Refusal,
    Started,
)
from tests.serving.local_application import LocalHandle

REQUEST = GenerateRequest("pacos", ("An adult alpaca",), max_tokens=3, temperature=1.0)
COMPLETION = Completion("hash", (PromptInfo(3),), (Choice("eats hay", "stop", 3),))
DIED = ActorDiedError()
SHUTS_DOWN = Refusal(503, "the engine has been shut down", code=SHUTTING_DOWN, retry_after_s=1)


class Replicas:
    """A deployment of which each call meets the next of `fates`: an exception, or what it answers."""

    def __init__(self, *fates: Any) -> None:
        self.fates = list(fates)

    async def complete(self, request: GenerateRequest) -> Any:
        fate = self.fates.pop(0)
        if isinstance(fate, Exception):
            raise fate
        return fate

    async def search(self, *args: Any) -> Any:
        return await self.complete(REQUEST)

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Any, None]:
        for item in self.fates.pop(0):
            if isinstance(item, Exception):
                raise item
            yield (item,)


def answering(replicas: Replicas, **settings: Any) -> Answering:
    handle = LocalHandle(replicas)
    return Answering(ApplicationConfig(**settings), generator=handle, retriever=handle)  # type: ignore[arg-type]


@pytest.mark.parametrize("end", [DIED, ActorUnavailableError("gone", None), SHUTS_DOWN])
def test_what_a_replica_did_not_answer_another_does(end) -> None:
    async def main() -> None:
        assert await answering(Replicas(end, COMPLETION)).complete(REQUEST) == (COMPLETION, "miss")
        assert await answering(Replicas(end, [])).search("hay?", top_k=1) == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fates", "code", "status", "left"),
    [
        ((DIED, DIED, COMPLETION), "unavailable", 503, 1),  # it may be the request that kills
        ((DeploymentUnavailableError(None), COMPLETION), "unavailable", 503, 1),
        ((Refusal(429, "full", code="queue_full", retry_after_s=2), COMPLETION), "queue_full", 429, 1),
    ],
)
def test_other_failures_are_told_at_once(fates, code, status, left) -> None:
    replicas = Replicas(*fates)

    async def main() -> None:
        with pytest.raises(ApiError) as error:
            await answering(replicas).complete(REQUEST)
        refusal = error.value.refusal
        assert (refusal.code, refusal.status) == (code, status) and refusal.retry_after_s
        assert len(replicas.fates) == left

    asyncio.run(main())


@pytest.mark.parametrize("ask", ["whole", "streamed"])
def test_a_full_queue_is_not_asked_again_for_a_moment(ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(answering_module, "time", SimpleNamespace(monotonic=lambda: now))
    full, begun = Refusal(429, "full", code="queue_full", retry_after_s=7), Started("hash", COMPLETION.prompts)
    answer: Any = (begun, Piece(0, "eats hay", 3, "stop")) if ask == "streamed" else COMPLETION
    refused = (full,) if ask == "streamed" else full
    replicas = Replicas(refused, answer, answer, refused, answer)
    answers = answering(replicas)

    async def is_answered(request: GenerateRequest) -> bool:
        try:
            if ask == "whole":
                await answers.complete(request)
            else:
                assert [item async for item in answers.stream(request)]
        except ApiError as error:
            assert error.refusal == full
            return False
        return True

    async def main() -> None:
        nonlocal now
        assert not await is_answered(REQUEST) and len(replicas.fates) == 4
        now += 0.09
        assert not await is_answered(REQUEST) and len(replicas.fates) == 4, "nobody was asked"
        assert await is_answered(replace(REQUEST, model="another"))
        now += 0.02
        assert await is_answered(REQUEST)
        assert not await is_answered(replace(REQUEST, n=2)), "two find no room"
        assert await is_answered(REQUEST), "where one does"

    asyncio.run(main())


def test_a_mistake_of_ours_is_raised_as_it_is_and_not_tried_again() -> None:
    replicas = Replicas(ZeroDivisionError(), COMPLETION)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(answering(replicas).complete(REQUEST))
    assert len(replicas.fates) == 1


def test_both_tries_share_one_timeout() -> None:
    class Slow(Replicas):
        async def complete(self, request: GenerateRequest) -> Any:
            await asyncio.sleep(0.3)
            return await super().complete(request)

    async def main() -> None:
        with pytest.raises(ApiError) as error:
            await answering(Slow(DIED, COMPLETION), request_timeout_s=0.45).complete(REQUEST)
        assert error.value.refusal.status == 504

    asyncio.run(main())


STREAM = (Started("hash", (PromptInfo(3),)), Piece(0, "eats", 1), Piece(0, " hay", 2, "stop"))


async def streamed(replicas: Replicas) -> list[Any]:
    items: list[Any] = []
    try:
        async with aclosing(answering(replicas).stream(REQUEST)) as stream:
            async for item in stream:
                items.append(item)
    except ApiError as error:
        items.append(error.refusal.code)
    return items


@pytest.mark.parametrize("end", [DIED, SHUTS_DOWN])
def test_a_stream_begins_anew_elsewhere_as_long_as_nothing_was_sent(end) -> None:
    assert asyncio.run(streamed(Replicas([end], STREAM))) == list(STREAM)


def test_a_stream_that_breaks_off_ends_with_an_error_and_nothing_twice() -> None:
    assert asyncio.run(streamed(Replicas([*STREAM[:2], DIED], STREAM))) == [*STREAM[:2], "unavailable"]
    assert asyncio.run(streamed(Replicas([DIED], [DIED], STREAM))) == ["unavailable"]
