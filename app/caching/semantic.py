"""Answers found again for another wording of their question. Knows no models, no HTTP and no embedder of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from app.caching.exact import ResponseCache

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts -> float32 [texts, width], each row of length 1, or 0 for a text that says nothing to the embedder."""


class Wordings:
    """Which question was answered under which key, by a key that all its wordings share.

    Such a key is of `app.caching.wording.canonical`'s form of the question, and of all else that shapes the answer. So
    one lookup finds whatever the gate lets through, in a shared server too, and no search among vectors is needed. The
    vectors have the last word: `embed` must find both questions alike.
    """

    def __init__(self, cache: ResponseCache, embed: Embed, *, threshold: float) -> None:
        self._cache = cache
        self._embed = embed
        self._threshold = threshold

    async def get(self, key: str, question: str) -> dict[str, Any] | None:
        """The answer to the same question in other words."""
        match await self._cache.get(key):
            case {"question": str(answered), "key": str(answer_key)} if self._are_alike(question, answered):
                return await self._cache.get(answer_key)
        return None

    async def put(self, key: str, question: str, *, answer_key: str) -> None:
        await self._cache.put(key, {"question": question, "key": answer_key})

    def _are_alike(self, question: str, answered: str) -> bool:
        first, second = self._embed([question, answered])
        return float(first @ second) >= self._threshold
