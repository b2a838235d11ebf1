import asyncio
from contextlib import aclosing

import pytest

from app.serving.messages import Piece, TokenLogprob
from app.serving.streams import merge


def test_streams_are_read_as_one_and_closed_together():
    closed: list[str] = []

    async def source(name, *pauses):
        try:
            for number, pause in enumerate(pauses):
                await asyncio.sleep(pause)
                yield f"{name}{number}"
        finally:
            closed.append(name)

    async def run():
        return [item async for item in merge([source("a", 0, 0.1), source("b", 0.05)])]

    assert asyncio.run(run()) == ["a0", "b0", "a1"] and sorted(closed) == ["a", "b"]


def test_one_streams_exception_ends_all():
    async def endless():
        while True:
            await asyncio.sleep(0.01)
            yield 0

    async def failing():
        yield 1
        raise ValueError("no")

    async def run():
        return [item async for item in merge([endless(), failing()])]

    with pytest.raises(ValueError, match="no"):
        asyncio.run(run())


def test_leaving_closes_the_sources():
    closed: list[str] = []

    async def source(name):
        try:
            while True:
                await asyncio.sleep(0.01)
                yield name
        finally:
            closed.append(name)

    async def run():
        async with aclosing(merge([source("a"), source("b")])) as items:
            await anext(items)

    asyncio.run(run())
    assert sorted(closed) == ["a", "b"]


def test_pieces_of_one_choice_join_to_what_they_were():
    token = TokenLogprob("a", (97,), -1.0)
    first, second = Piece(0, "a", 1, None, (token,)), Piece(0, "b", 2, "stop", (token, token))
    assert first.followed_by(second) == Piece(0, "ab", 3, "stop", (token,) * 3)
