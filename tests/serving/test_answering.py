"""The way to an answer: cache, then generator. A generator that counts stands in for the real one, and for a while a
real Redis stands behind the cache; test_http.py has it all over HTTP."""

import asyncio
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from app.config import ApplicationConfig
from app.config.serving import ApiKeyConfig
from app.data.records import Message
from app.serving import answering as answering_module
from app.serving.access import current_key
from app.serving.answering import Answering
from app.serving.api_errors import ApiError
from app.serving.ingress import create_api
from app.serving.messages import (
    ChatPrompt,
    Choice,
    Completion,
    GenerateRequest,
    Items,
    ModelInfo,
    Piece,
    PromptInfo,
    Started,
)
from tests.serving.local_application import LocalHandle


class Generator:
    """Answers with the model's hash and how many answers it has given, after `seconds`."""

    def __init__(self, *, seconds: float = 0.0) -> None:
        self.hash, self.seconds = "first", seconds
        self.num_answers = self.num_listings = 0

    async def models(self) -> list[ModelInfo]:
        self.num_listings += 1
        return [ModelInfo("pacos", self.hash, 99, {})]

    async def complete(self, request: GenerateRequest) -> Completion:
        model_hash, self.num_answers = self.hash, self.num_answers + 1
        text = f"{model_hash} {self.num_answers}"
        await asyncio.sleep(self.seconds)
        return Completion(model_hash, (PromptInfo(3),), (Choice(text, "stop", 2),))

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Items, None]:
        completion = await self.complete(request)
        yield Started(completion.model_hash, completion.prompts), Piece(0, completion.choices[0].text, 2, "stop")


def asked(question: str, **fields: Any) -> GenerateRequest:
    prompts = (ChatPrompt((Message("user", question),)),)
    return GenerateRequest(**{"model": "pacos", "prompts": prompts, "max_tokens": 9, "temperature": 0.0} | fields)


def answering(generator: Generator, **cache: Any) -> Answering:
    config = ApplicationConfig.model_validate({"cache": cache})
    return Answering(config, generator=LocalHandle(generator), retriever=LocalHandle(None))


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


async def whole(answering: Answering, request: GenerateRequest) -> tuple[str, str]:
    completion, result = await answering.complete(request)
    await asyncio.sleep(0)  # what is kept in the background is kept
    return completion.choices[0].text, result


async def streamed(answering: Answering, request: GenerateRequest) -> tuple[str, str]:
    started, *pieces = [item async for item in answering.stream(request)]
    await asyncio.sleep(0)
    return "".join(piece.text for piece in pieces), started.cache


QUESTION = "What is the capital of Peru?"


def test_an_answer_is_computed_once_and_found_by_its_request_and_by_another_wording():
    async def scenario() -> None:
        generator = Generator()
        answers = answering(generator, semantic=True)
        assert await whole(answers, asked(QUESTION)) == ("first 1", "miss")
        for ask in (whole, streamed):
            assert await ask(answers, asked(QUESTION)) == ("first 1", "hit")
            assert await ask(answers, asked("What's the capital of Peru?")) == ("first 1", "semantic")
        assert await streamed(answers, asked("What's the capital of Chile?")) == ("first 2", "miss")
        assert await whole(answers, asked("Please tell me the capital of Chile.")) == ("first 2", "semantic")
        assert generator.num_answers == 2

    run(scenario)


def test_the_header_says_whether_and_how_an_answer_was_found():
    async def scenario() -> None:
        transport = httpx.ASGITransport(create_api(answering(Generator(), semantic=True)))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:

            async def header(question: str, **fields: Any) -> str:
                messages = [{"role": "user", "content": question}]
                body = {"model": "pacos", "messages": messages, "temperature": 0, "max_tokens": 9} | fields
                response = await client.post("/v1/chat/completions", json=body)
                assert response.status_code == 200 and "first 1" in response.text
                return response.headers["x-pacos-cache"]

            assert [await header(QUESTION), await header(QUESTION)] == ["miss", "hit"]
            for stream in (False, True):
                assert await header(QUESTION, stream=stream) == "hit"
                assert await header("Can you tell me the capital of Peru?", stream=stream) == "semantic"

    run(scenario)


def test_a_hundred_equal_requests_at_once_compute_one():
    async def scenario() -> None:
        generator = Generator(seconds=0.1)
        answers = answering(generator)
        results = await asyncio.gather(*(whole(answers, asked(QUESTION)) for _ in range(100)))
        assert generator.num_answers == 1 and {text for text, _ in results} == {"first 1"}
        assert sorted(result for _, result in results) == ["hit"] * 99 + ["miss"]
        other = asked("Why?")
        results = await asyncio.gather(*(streamed(answers, other) for _ in range(100)))
        assert generator.num_answers == 2 and {text for text, _ in results} == {"first 2"}
        assert sorted(result for _, result in results) == ["hit"] * 99 + ["miss"]

    run(scenario)


def test_requests_without_a_seed_are_each_computed_unless_their_answers_may_be_kept():
    async def scenario() -> None:
        drawn = asked(QUESTION, temperature=1.0)
        answers = answering(Generator())
        assert [await whole(answers, drawn) for _ in range(2)] == [("first 1", "miss"), ("first 2", "miss")]
        kept = answering(Generator(), sampled=True)
        assert [await whole(kept, drawn) for _ in range(2)] == [("first 1", "miss"), ("first 1", "hit")]

    run(scenario)


def test_a_promoted_model_answers_anew_in_both_levels(monkeypatch):
    monkeypatch.setattr(answering_module, "_MODELS_FOR_S", 0.2)

    async def scenario() -> None:
        generator = Generator()
        answers = answering(generator, semantic=True)
        wordings = [QUESTION, "What's the capital of Peru?"]
        assert await whole(answers, asked(QUESTION)) == ("first 1", "miss")
        generator.hash = "second"
        await asyncio.sleep(0.25)
        assert await whole(answers, asked(wordings[1])) == ("second 2", "miss")
        assert [await whole(answers, asked(wording)) for wording in wordings] == [
            ("second 2", "semantic"), ("second 2", "hit")
        ]  # fmt: skip
        generator.hash = "first"  # rolled back: what it had answered is right again
        await asyncio.sleep(0.25)
        assert await whole(answers, asked(QUESTION)) == ("first 1", "hit")

    run(scenario)


def test_an_answer_of_a_model_that_took_over_meanwhile_is_not_kept_under_the_old_ones_key():
    async def scenario() -> None:
        generator = Generator()
        answers = answering(generator)
        assert await whole(answers, asked("Why?")) == ("first 1", "miss")
        generator.hash = "second"
        assert await whole(answers, asked(QUESTION)) == ("second 2", "miss")
        generator.hash = "first"
        assert await whole(answers, asked(QUESTION)) == ("first 3", "miss")

    run(scenario)


def test_nor_where_the_list_of_models_is_renewed_while_it_is_computed():
    async def scenario() -> None:
        generator = Generator(seconds=0.05)
        answers = answering(generator)
        assert await whole(answers, asked("Why?")) == ("first 1", "miss")
        generator.hash = "second"
        answer = asyncio.create_task(whole(answers, asked(QUESTION)))
        await asyncio.sleep(0.01)
        await answers.models()
        assert await answer == ("second 2", "miss")
        generator.hash = "first"
        await answers.models()
        assert await whole(answers, asked(QUESTION)) == ("first 3", "miss")

    run(scenario)


def test_more_log_probabilities_than_can_be_written_down_soon_are_refused():
    async def scenario() -> None:
        answers = answering(Generator())
        request = asked(QUESTION, n=128, logprobs=20, max_tokens=480)
        with pytest.raises(ApiError) as whole_one:
            await answers.complete(request)
        with pytest.raises(ApiError) as streamed:
            async for _ in answers.stream(request):
                pass
        for error in (whole_one.value, streamed.value):
            assert (error.refusal.status, error.refusal.param) == (400, "logprobs")
        await answers.complete(asked(QUESTION, n=8, logprobs=5, max_tokens=480))

    run(scenario)


def test_log_probabilities_are_asked_for_without_a_length_as_the_context_ends_the_answer():
    async def scenario() -> None:
        transport = httpx.ASGITransport(create_api(answering(Generator())))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            messages = [{"role": "user", "content": QUESTION}]

            async def refused(**fields: Any) -> str | None:
                body = {"model": "pacos", "messages": messages, "logprobs": True} | fields
                response = await client.post("/v1/chat/completions", json=body)
                assert response.status_code in (200, 400)
                return response.json()["error"]["code"] if response.status_code == 400 else None

            for stream in (False, True):
                for model in ("pacos", "pacos:registered-and-not-loaded-yet"):
                    assert await refused(model=model, stream=stream, top_logprobs=20) is None
                assert await refused(stream=stream, n=128, top_logprobs=20) == "too_many_logprobs"

    run(scenario)


def test_in_use_the_list_of_models_is_renewed_before_anyone_waits_for_it(monkeypatch):
    now = 100.0
    monkeypatch.setattr(answering_module, "time", SimpleNamespace(monotonic=lambda: now))

    async def scenario() -> None:
        nonlocal now
        generator = Generator()
        answers = answering(generator)
        for step in range(50):
            assert step == 0 or answers._models_until > now, "this one has to wait for it"
            await whole(answers, asked(QUESTION))
            while answers._refresh is not None and not answers._refresh.done():
                await asyncio.sleep(0)
            now += answering_module._MODELS_FOR_S / 8
        assert 7 <= generator.num_listings <= 13, "in the time that six last"

    run(scenario)


def test_no_key_finds_what_another_has_asked():
    async def scenario() -> None:
        answers = answering(Generator(), semantic=True)

        async def by(name: str, question: str) -> str:
            current_key.set(ApiKeyConfig(name=name, sha256="0" * 64))
            return (await whole(answers, asked(question)))[1]

        ana = [await by("ana", QUESTION), await by("ana", QUESTION), await by("ana", "What's the capital of Peru?")]
        assert ana == ["miss", "hit", "semantic"]
        assert await by("ben", "What's the capital of Peru?") == "miss" and await by("ben", QUESTION) == "semantic"

    run(scenario)


# --- replicas that share a Redis ---


def redis(url: str, **fields: Any) -> dict[str, Any]:
    return {"backend": {"type": "redis", "url": url, "timeout_s": 5.0} | fields}


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # `run` bounds it
        await asyncio.sleep(0.02)


def test_replicas_share_answers_and_wordings_through_redis(redis_url):
    async def scenario() -> None:
        generator = Generator()
        first, second = (answering(generator, **redis(redis_url), semantic=True) for _ in range(2))
        await whole(first, asked(QUESTION))
        key = await second._key(asked("What's the capital of Peru?"))

        async def is_kept() -> bool:
            return await second._cache.get(key) is not None

        await until(is_kept)
        assert await whole(second, asked(QUESTION)) == ("first 1", "hit")
        assert await streamed(second, asked("What's the capital of Peru?")) == ("first 1", "semantic")
        assert generator.num_answers == 1

    run(scenario)


def test_a_redis_that_is_killed_under_load_costs_no_request_its_answer(redis_server):
    server, url = redis_server

    async def scenario() -> None:
        answers = answering(Generator(seconds=0.01), **redis(url, timeout_s=0.5))
        slowest = 0.0

        async def ask(number: int) -> str:
            nonlocal slowest
            started = time.perf_counter()
            text, result = await whole(answers, asked(f"Question {number % 20}?"))
            slowest = max(slowest, time.perf_counter() - started)
            assert text.startswith("first ")
            return result

        results = []
        for number in range(400):
            results.append(asyncio.create_task(ask(number)))
            if number == 200:
                server.send_signal(signal.SIGKILL)
                server.wait()
            await asyncio.sleep(0.002)
        given = await asyncio.gather(*results)
        assert "hit" in given[:200] and "miss" in given[220:], "the cache was used, and then was not there"
        assert answers._cache._responses.errors > 0 and slowest < 5

    run(scenario)


def test_a_redis_that_hangs_costs_one_deadline_and_is_used_again_once_it_answers(redis_server):
    server, url = redis_server

    async def scenario() -> None:
        generator = Generator()
        answers = answering(generator, **redis(url, timeout_s=0.3))
        answers._cache._responses._backend._pause_s = 0.5
        await whole(answers, asked("first?"))  # connects

        async def hits() -> bool:
            return (await whole(answers, asked(QUESTION)))[1] == "hit"

        await until(hits)
        server.send_signal(signal.SIGSTOP)
        try:
            times = []
            for _ in range(10):
                started = time.perf_counter()
                assert (await whole(answers, asked(QUESTION)))[1] == "miss"
                times.append(time.perf_counter() - started)
        finally:
            server.send_signal(signal.SIGCONT)
        assert times[0] >= 0.3 and sum(times[1:]) < 0.3, "after one deadline it is left alone"
        await until(hits)

    run(scenario)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0"])
def test_a_redis_that_is_not_there_is_a_miss(url):
    async def scenario() -> None:
        answers = answering(Generator(), **redis(url), semantic=True)
        assert [(await whole(answers, asked(QUESTION)))[1] for _ in range(3)] == ["miss"] * 3

    run(scenario)
