import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from app.caching.backends import MemoryBackend
from app.caching.exact import ResponseCache, cache_key
from app.caching.semantic import Embed, Wordings
from app.caching.wording import canonical
from app.config import CacheConfig
from app.retrieval.embedding import Embedder


@pytest.fixture(scope="module")
def embed() -> Embed:
    return Embedder("embedded").embed


def pairs(name: str) -> list[tuple[str, str]]:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return [(row["a"], row["b"]) for row in map(json.loads, lines)]


async def is_found(asked: str, kept: str, embed: Embed, threshold: float = CacheConfig().similarity) -> bool:
    """Whether who asks `asked` gets what answered `kept`."""
    cache = ResponseCache(MemoryBackend(max_bytes=100_000), ttl_s=60)
    wordings = Wordings(cache, embed, threshold=threshold)
    await cache.put("answer", {"text": kept})
    await wordings.put(cache_key("m", question=canonical(kept)), kept, answer_key="answer")
    found = await wordings.get(cache_key("m", question=canonical(asked)), asked)
    assert found in (None, {"text": kept})
    return found is not None


def test_no_adversarial_question_gets_the_others_answer(embed):
    async def scenario() -> None:
        for a, b in pairs("adversarial.jsonl"):
            assert not await is_found(a, b, embed), (a, b)
            assert not await is_found(b, a, embed), (b, a)

    asyncio.run(scenario())


def test_most_paraphrases_get_the_others_answer_and_each_question_its_own(embed):
    async def scenario() -> int:
        for a, b in pairs("paraphrases.jsonl"):
            assert await is_found(a, a, embed) and await is_found(b, b, embed)
            assert await is_found(a, b, embed) == await is_found(b, a, embed)
        return sum([await is_found(a, b, embed) for a, b in pairs("paraphrases.jsonl")])

    assert asyncio.run(scenario()) > 0.7 * len(pairs("paraphrases.jsonl"))


def test_the_embedder_alone_would_mix_them_up(embed):
    """Why there is a gate: no threshold tells the two lists from each other."""

    def similarities(name: str) -> np.ndarray:
        return np.array([float(np.dot(*embed(pair))) for pair in pairs(name)])

    same, other = similarities("paraphrases.jsonl"), similarities("adversarial.jsonl")
    assert np.median(other) > np.quantile(same, 0.25)
    assert max(np.mean(same >= t) - np.mean(other >= t) for t in np.linspace(0, 1, 101)) < 0.3


def test_the_vectors_have_the_last_word():
    def unlike(texts: Sequence[str]) -> np.ndarray:
        return np.eye(2, dtype=np.float32)

    def silent(texts: Sequence[str]) -> np.ndarray:
        return np.zeros((2, 2), dtype=np.float32)

    questions = ("What's the capital of Peru?", "What is the capital of Peru?")
    assert not asyncio.run(is_found(*questions, unlike, threshold=0.1))
    assert not asyncio.run(is_found(*questions, silent, threshold=0.1))


def test_an_answer_that_is_gone_is_a_miss(embed):
    async def scenario() -> None:
        cache = ResponseCache(MemoryBackend(max_bytes=100_000), ttl_s=60)
        wordings = Wordings(cache, embed, threshold=0.5)
        await wordings.put("form", "Why?", answer_key="gone")
        assert await wordings.get("form", "Why?") is None

    asyncio.run(scenario())


@pytest.mark.parametrize("entry", [{}, {"question": 3, "key": "answer"}, {"question": "Why?"}, {"key": "answer"}])
def test_an_entry_of_another_program_is_a_miss(entry, embed):
    async def scenario() -> None:
        cache = ResponseCache(MemoryBackend(max_bytes=100_000), ttl_s=60)
        await cache.put("answer", {"text": "Because."})
        await cache.put("form", entry)
        assert await Wordings(cache, embed, threshold=0.5).get("form", "Why?") is None

    asyncio.run(scenario())
