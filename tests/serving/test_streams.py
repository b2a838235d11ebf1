import asyncio
from contextlib import aclosing

import pytest

from app.serving.messages import Piece, Started, TokenLogprob, joined
from app.serving.streams import coalesced


async def source(*items, closed: list | None = None):
    """Gives numbers; None waits for a moment, an exception is raised."""
    try:
        for item in items:
            if item is None:
                await asyncio.sleep(0.05)
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        if closed is not None:
            closed.append(True)


def joined_texts(*items, interval_s: float = 0.02) -> list[str]:
    async def run() -> list[str]:
        stream = coalesced(
            source(*items),
            joined=lambda a, b: None if "|" in a + b else a + b,
            is_urgent=lambda text: "!" in text,
            interval_s=lambda: interval_s,
        )
        async with aclosing(stream) as texts:
            return [text async for text in texts]

    return asyncio.run(run())


def test_the_first_item_comes_alone_and_what_follows_soon_comes_together():
    assert joined_texts("a", "b", "c", None, "d", "e", None, None, "f") == ["a", "bc", "d", "e", "f"]


def test_without_a_pause_every_item_is_its_own():
    assert joined_texts("a", None, "b", None, "c", interval_s=0.0) == ["a", "b", "c"]


def test_an_urgent_item_takes_along_what_waits():
    assert joined_texts("a", "b", "c!", "d", interval_s=100) == ["a", "bc!", "d"]


def test_what_must_not_be_joined_comes_in_order():
    assert joined_texts("a", "b", "|", "c", "d") == ["a", "b", "|", "cd"]


def test_an_error_comes_after_what_was_there_before_it():
    seen = []

    async def run():
        stream = coalesced(
            source("a", "b", ValueError("no")),
            joined=lambda a, b: a + b,
            is_urgent=lambda text: False,
            interval_s=lambda: 100,
        )
        async with aclosing(stream) as texts:
            async for text in texts:
                seen.append(text)

    with pytest.raises(ValueError, match="no"):
        asyncio.run(run())
    assert seen == ["a", "b"]


def test_leaving_closes_the_source():
    closed: list[bool] = []

    async def run():
        stream = coalesced(
            source("a", None, "b", None, None, "c", closed=closed),
            joined=lambda a, b: a + b,
            is_urgent=lambda text: False,
            interval_s=lambda: 0.0,
        )
        async with aclosing(stream) as texts:
            assert await anext(texts) == "a"

    asyncio.run(run())
    assert closed == [True]


def test_pieces_of_one_choice_join_to_what_they_were():
    token = TokenLogprob("a", (97,), -1.0)
    first, second = Piece(0, "a", 1, None, (token,)), Piece(0, "b", 2, "stop", (token, token))
    assert joined(first, second) == Piece(0, "ab", 3, "stop", (token,) * 3)
    assert joined(first, Piece(1, "b", 1)) is None and joined(Started("x", ()), first) is None
