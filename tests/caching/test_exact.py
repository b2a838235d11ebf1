import asyncio
import logging
from typing import Any

import pytest

from app.caching.backends import BackendUnavailable, MemoryBackend
from app.caching.exact import ResponseCache, cache_key


class FlakyBackend(MemoryBackend):
    """A memory backend that can be switched off."""

    is_up = True

    async def get(self, key: str) -> str | None:
        self._check()
        return await super().get(key)

    async def put(self, key: str, value: str, *, ttl_s: float) -> None:
        self._check()
        await super().put(key, value, ttl_s=ttl_s)

    def _check(self) -> None:
        if not self.is_up:
            raise BackendUnavailable("switched off")


def test_the_key_is_the_same_whatever_the_order_of_fields() -> None:
    assert cache_key("m", prompt="a", max_tokens=5) == cache_key("m", max_tokens=5, prompt="a")
    assert len(cache_key("m", prompt="a")) == 64


def test_whatever_shapes_the_answer_changes_the_key() -> None:
    base: dict[str, Any] = {"prompt": "Who?", "max_tokens": 5, "temperature": 0.0, "stop": ["\n"], "index": None}
    changes: list[dict[str, Any]] = [
        {"prompt": "who?"},
        {"prompt": "Who? "},
        {"max_tokens": 6},
        {"temperature": 0.1},
        {"stop": []},
        {"stop": "\n"},
        {"index": "abc"},
        {"seed": 0},
    ]
    keys = [cache_key("m", **base), cache_key("n", **base), *(cache_key("m", **(base | change)) for change in changes)]
    assert len(set(keys)) == len(keys)


def test_values_cannot_be_shifted_between_fields() -> None:
    assert cache_key("m", a='x","b":"y', b="") != cache_key("m", a="x", b='y","b":"')
    assert cache_key("m", a="é") != cache_key("m", a="e\u0301")
    assert cache_key("m", a="\ud800")  # a lone surrogate has a key, too


def test_what_json_does_not_know_has_no_key() -> None:
    with pytest.raises(ValueError):
        cache_key("m", temperature=float("nan"))
    with pytest.raises(TypeError):
        cache_key("m", stop={"set"})


def test_a_kept_answer_is_found_and_counted() -> None:
    async def scenario() -> None:
        cache = ResponseCache(MemoryBackend(max_bytes=10_000), ttl_s=60)
        answer = {"text": "Größe 🦙", "tokens": 3}
        assert await cache.get("k") is None
        await cache.put("k", answer)
        answer["text"] = "changed by the caller"
        found = await cache.get("k")
        assert found == {"text": "Größe 🦙", "tokens": 3}
        assert cache.errors == 0

    asyncio.run(scenario())


def test_an_outage_is_a_miss_counted_each_time_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        backend = FlakyBackend(max_bytes=10_000)
        cache = ResponseCache(backend, ttl_s=60)
        await cache.put("k", {"text": "a"})
        backend.is_up = False
        for _ in range(3):
            assert await cache.get("k") is None
        await cache.put("k", {"text": "b"})
        assert cache.errors == 4
        assert len(caplog.records) == 1
        backend.is_up = True
        assert await cache.get("k") == {"text": "a"}
        backend.is_up = False
        assert await cache.get("k") is None

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "response cache: switched off",
        "response cache: back after 4 failed operations in all",
        "response cache: switched off",
    ]


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "null", pytest.param("[" * 200_000, id="deep")])
def test_what_is_no_object_under_our_key_is_a_miss(text: str) -> None:
    async def scenario() -> None:
        backend = MemoryBackend(max_bytes=10**6)
        await backend.put("k", text, ttl_s=60)
        assert await backend.get("k") == text
        assert await ResponseCache(backend, ttl_s=60).get("k") is None

    asyncio.run(scenario())
