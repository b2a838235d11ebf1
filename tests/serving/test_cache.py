"""Which requests have an answer in common, without Ray and models; test_answering.py has the way to the answer."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from app.config import CacheConfig
from app.data.records import Message
from app.serving.cache import AnswerCache
from app.serving.messages import ChatPrompt, Choice, Completion, GenerateRequest, PromptInfo, TokenLogprob


def conversation(*messages: str, system: str | None = None, passages: tuple[str, ...] = ()) -> ChatPrompt:
    turns = [Message(("user", "assistant")[number % 2], text) for number, text in enumerate(messages)]
    head = [] if system is None else [Message("system", system)]
    return ChatPrompt((*head, *turns), passages)


def chat(*messages: str, system: str | None = None, passages: tuple[str, ...] = (), **fields: Any) -> GenerateRequest:
    prompts = (conversation(*messages, system=system, passages=passages),)
    return GenerateRequest(**{"model": "pacos", "prompts": prompts, "max_tokens": 9, "temperature": 0.0} | fields)


def answer(text: str) -> Completion:
    token = TokenLogprob(text, (1, 2), -0.5, (TokenLogprob("other", (3,), -1.5),))
    return Completion("hash", (PromptInfo(3, 1),), (Choice(text, "stop", 2, (token,)),))


KEPT = chat("What is the capital of Peru?")


@pytest.fixture(scope="module")
def semantic() -> AnswerCache:
    return AnswerCache(CacheConfig(semantic=True))


def found(cache: AnswerCache, asked: GenerateRequest, kept: GenerateRequest = KEPT, **who: Any) -> str | None:
    """How `asked` is answered where `kept` has been: by `hit`, `semantic` or not at all."""
    owner = {"model_hash": "m", "tenant": "ana"}

    async def scenario() -> str | None:
        cache.put(cache.key(kept, **owner), answer("Lima."))
        await asyncio.gather(*cache._writes)
        result = await cache.get(cache.key(asked, **owner | who))
        assert result is None or result[0] == answer("Lima.")
        return None if result is None else result[1]

    return asyncio.run(scenario())


def test_an_answer_comes_back_whole_to_the_same_request_and_to_another_wording(semantic):
    assert found(semantic, chat("What is the capital of Peru?")) == "hit"
    assert found(semantic, chat("Please tell me the capital of Peru.")) == "semantic"
    assert found(semantic, chat("What is the capital of Chile?")) is None


def test_without_being_asked_for_only_the_same_request_is_answered():
    cache = AnswerCache(CacheConfig())
    assert found(cache, KEPT) == "hit"
    assert found(cache, chat("What's the capital of Peru?")) is None


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 8}, {"n": 2}, {"stop": ("\n",)}, {"logit_bias": {3: 1.0}}, {"temperature": 0.1, "seed": 1},
        {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"repetition_penalty": 1.1}, {"ignore_eos": True},
        {"logprobs": 1}, {"logprobs": 0}, {"system": "Be brief."}, {"passages": ("Lima is the capital.",)},
    ],
)  # fmt: skip
def test_whatever_shapes_the_answer_parts_the_requests_in_both_levels(semantic, change):
    assert found(semantic, chat("What is the capital of Peru?", **change)) is None
    assert found(semantic, chat("What's the capital of Peru?", **change)) is None


@pytest.mark.parametrize("who", [{"tenant": "ben"}, {"tenant": None}, {"model_hash": "retrained"}])
def test_another_tenant_or_another_model_finds_nothing(semantic, who):
    assert found(semantic, KEPT, **who) is None
    assert found(semantic, chat("What's the capital of Peru?"), **who) is None


def test_what_does_not_shape_a_greedy_answer_does_not_part_requests(semantic):
    assert found(semantic, chat("What is the capital of Peru?", seed=4, top_p=0.5, top_k=3, min_p=0.1)) == "hit"
    drawn = chat("Why?", temperature=1.0, seed=4)
    assert found(semantic, replace(drawn, seed=5), drawn) is None
    assert found(semantic, replace(drawn, top_p=0.5), drawn) is None
    assert found(semantic, replace(drawn, model="another name of the same weights"), drawn) == "hit"


def test_a_changed_document_invalidates_what_rested_on_it_and_nothing_else(semantic):
    kept = chat("What is the capital of Peru?", passages=("Lima is the capital.", "Peru has coasts."))
    assert found(semantic, replace(kept), kept) == "hit"
    for wording in ("What is the capital of Peru?", "What's the capital of Peru?"):
        for passages in [("Cusco is the capital.", "Peru has coasts."), ("Lima is the capital.",), ()]:
            # without passages there is `KEPT`, which other tests have kept
            asked = chat(wording, passages=passages, max_tokens=7)
            assert found(semantic, asked, replace(kept, max_tokens=7)) is None
    assert found(semantic, chat("What's the capital of Peru?", passages=kept.prompts[0].passages), kept) == "semantic"


def test_earlier_messages_must_be_the_same_to_the_letter(semantic):
    kept = chat("I like Peru.", "Nice!", "What is the capital of Peru?", system="Be brief.")
    last = "What's the capital of Peru?"
    assert found(semantic, chat("I like Peru.", "Nice!", last, system="Be brief."), kept) == "semantic"
    assert found(semantic, chat("I like Peru!", "Nice!", last, system="Be brief."), kept) is None
    assert found(semantic, chat("I like Peru.", "Nice.", last, system="Be brief."), kept) is None
    assert found(semantic, chat("I like Peru.", "Nice!", last, system="Be  brief."), kept) is None
    assert found(semantic, chat("I like Peru.", "Nice!", last), kept) is None


def test_a_system_prompt_about_words_wants_the_same_words(semantic):
    for system in ("Count the letters of each message.", "You correct spelling.", "Translate into Spanish."):
        kept = chat("What is the capital of Peru?", system=system)
        assert found(semantic, kept, kept) == "hit"
        assert found(semantic, chat("What's the capital of Peru?", system=system), kept) is None


@pytest.mark.parametrize(
    "prompts",
    [
        ("What's the capital of Peru?",),
        ((1, 2, 3),),
        (conversation("What's the capital of Peru?"), conversation("Why?")),
        (conversation("Why?", "What's the capital of Peru?"),),
    ],
)
def test_a_text_to_go_on_with_is_not_a_question(semantic, prompts):
    assert semantic.key(chat("Why?", prompts=prompts), model_hash="m", tenant=None).wordings is None


def test_only_deterministic_requests_are_taken_unless_it_is_asked_for():
    drawn = chat("Why?", temperature=1.0)
    assert not AnswerCache(CacheConfig()).takes(drawn)
    assert AnswerCache(CacheConfig()).takes(replace(drawn, seed=3)) and AnswerCache(CacheConfig()).takes(KEPT)
    cache = AnswerCache(CacheConfig(sampled=True))
    assert cache.takes(drawn) and found(cache, drawn, drawn) == "hit"


def test_an_entry_of_another_format_is_a_miss(caplog):
    async def scenario() -> None:
        cache = AnswerCache(CacheConfig())
        key = cache.key(KEPT, model_hash="m", tenant=None)
        await cache._responses.put(key.exact, {"choices": [{"text": "of another version"}]})
        assert await cache.get(key) is None

    asyncio.run(scenario())
    assert "another format" in caplog.text
