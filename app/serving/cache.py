"""The answers that an ingress replica keeps: which requests have one in common, and where it lies.

In the ingress itself, because a lookup in memory takes microseconds, and a call to another deployment milliseconds.
"""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

from app.caching.backends import make_backend
from app.caching.exact import ResponseCache, cache_key
from app.caching.semantic import Wordings
from app.caching.wording import canonical, is_about_words
from app.config import CacheConfig
from app.data.records import Message
from app.serving.messages import CacheResult, ChatPrompt, Completion, GenerateRequest
from app.serving.metrics import CacheMetrics

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class AnswerKey:
    exact: str
    """Of the request as it is."""
    model_hash: str
    """Of the weights whose answer may lie there."""
    wordings: str | None = None
    """Of all requests whose last message asks the same in other words; none where only the same words will do."""
    question: str = ""


class AnswerCache:
    """Completions by what shapes them. Whatever fails is a miss, and soon: the backend has a deadline of its own."""

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._metrics = CacheMetrics()
        self._responses = ResponseCache(make_backend(config.backend), config.ttl_s)
        self._wordings = _wordings(self._responses, config) if config.semantic else None
        self._writes: set[asyncio.Task[None]] = set()
        self._tell_state()

    def takes(self, request: GenerateRequest) -> bool:
        """Whether its answer may be kept: without a seed the next one may differ."""
        return request.is_deterministic or self._config.sampled

    def key(self, request: GenerateRequest, *, model_hash: str, tenant: str | None) -> AnswerKey:
        """Where the answer lies, which depends on all that shapes it.

        What one tenant has asked is nothing that another can find out. Documents are in the key as the passages that
        stand in the prompt: where one of them changes, the answers that rest on it are no longer found, and no others.
        """
        exact = cache_key(model_hash, tenant=tenant, **request.identity())
        if self._wordings is None or (asked := _in_canonical_words(request)) is None:
            return AnswerKey(exact, model_hash)
        canonical_request, question = asked
        wordings = cache_key(model_hash, tenant=tenant, wordings=True, **canonical_request.identity())
        return AnswerKey(exact, model_hash, wordings, question)

    def count(self, result: str) -> None:
        """A request, by what there was for it: a `CacheResult`, or `uncached`."""
        self._metrics.count(result)

    async def get(self, key: AnswerKey) -> tuple[Completion, CacheResult] | None:
        try:
            return await self._found(key)
        finally:
            self._tell_state()

    async def _found(self, key: AnswerKey) -> tuple[Completion, CacheResult] | None:
        if completion := _read(await self._responses.get(key.exact)):
            return completion, "hit"
        if self._wordings is None or key.wordings is None:
            return None
        completion = _read(await self._wordings.get(key.wordings, key.question))
        return (completion, "semantic") if completion else None

    def put(self, key: AnswerKey, completion: Completion) -> None:
        """In the background; nobody waits for it."""
        self._in_background(self._responses.put(key.exact, completion.to_json()))
        if self._wordings is not None and key.wordings is not None:
            self._in_background(self._wordings.put(key.wordings, key.question, answer_key=key.exact))

    def _in_background(self, write: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._written(write))
        self._writes.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._writes.discard)

    async def _written(self, write: Coroutine[Any, Any, None]) -> None:
        await write
        self._tell_state()

    def _tell_state(self) -> None:
        kept = self._responses
        self._metrics.set_state(num_bytes=kept.num_bytes, errors=kept.errors, is_out=kept.is_out)


def _wordings(responses: ResponseCache, config: CacheConfig) -> Wordings:
    # The embedded embedder whatever the index uses: `similarity` means something for one embedder only, this one runs
    # in this process in a millisecond, and it needs no network.
    from app.retrieval.embedding import Embedder

    return Wordings(responses, Embedder("embedded").embed, threshold=config.similarity)


def _in_canonical_words(request: GenerateRequest) -> tuple[GenerateRequest, str] | None:
    """(`request` with its last message in canonical form, that message), if another wording could be answered alike.

    Not a raw prompt, which is text to go on with; not where log-probabilities are asked for, which depend on each word;
    and not where earlier messages, the system's among them, speak of words: "Count the letters of what I write".
    """
    match request.prompts:
        case (ChatPrompt() as prompt,) if request.logprobs is None and prompt.messages[-1].role == "user":
            *earlier, last = prompt.messages
            if any(is_about_words(message.content) for message in earlier):
                return None
            messages = (*earlier, Message(last.role, canonical(last.content)))
            return replace(request, prompts=(replace(prompt, messages=messages),)), last.content
    return None


def _read(values: dict[str, Any] | None) -> Completion | None:
    try:
        return Completion.from_json(values) if values else None
    except (KeyError, TypeError):  # another program's value in a shared server
        logger.warning("response cache: an entry of another format was ignored")
        return None
