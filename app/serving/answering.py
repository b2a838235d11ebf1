"""Answers requests by putting the other deployments together: cache, then generator; retriever before, for RAG."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from app.caching.single_flight import SingleFlight
from app.config import ApplicationConfig
from app.config.base import SearchMode
from app.serving.access import current_key
from app.serving.api_errors import ApiError
from app.serving.cache import AnswerCache, AnswerKey
from app.serving.documents import NO_LIBRARY
from app.serving.limiter import LimiterClient
from app.serving.messages import (
    SHUTTING_DOWN,
    CacheResult,
    Collector,
    Completion,
    Embeddings,
    GenerateRequest,
    Items,
    ModelInfo,
    Piece,
    Refusal,
    Retrieved,
    Started,
)
from app.serving.request_log import note

logger = logging.getLogger("ray.serve")

_MODELS_FOR_S = 2.0
"""A delta that was promoted answers for its name after so long at the latest, where the old one's answer is cached."""
_FULL_FOR_S = 0.1
"""A queue that has refused one answer is not asked for another so soon: under more load than can be carried most of the
work would be to refuse, and it is done on the cores that answer."""
_MOST_LOGPROBS = 250_000
"""Of one request: to write them down holds up all others of the replica, for some two seconds."""
_ENDED = Refusal(503, "the replica that worked on this has ended", code="unavailable", retry_after_s=2)
_TIMEOUT = "the answer took longer than request_timeout_s={seconds:g}"


class ReplicaEnded(ApiError):
    """The replica that worked on this is gone; another one may do it."""


class Answering:
    """Raises ApiError wherever there is no answer; cancelling a call aborts what it started."""

    def __init__(
        self,
        config: ApplicationConfig,
        *,
        generator: DeploymentHandle,
        retriever: DeploymentHandle,
        documents: DeploymentHandle | None = None,
        limiter: LimiterClient | None = None,
    ) -> None:
        self.config = config
        self._generator = generator
        self._streaming = generator.options(stream=True)
        self._retriever = retriever
        self._documents = documents
        self._cache = AnswerCache(config.cache)
        self._limiter = limiter
        self._flights = SingleFlight()
        self._full: dict[str, tuple[float, Refusal]] = {}
        """Models whose queue is taken for full, until when, and how it said so."""
        self._models: dict[str, ModelInfo] = {}
        self._models_until = 0.0
        self._refresh: asyncio.Task[None] | None = None

    async def models(self) -> list[ModelInfo]:
        """Asks the generator, so it also shows whether that answers."""
        models = await self._call(lambda: self._generator.models.remote())
        self._models = {model.name: model for model in models}
        self._models_until = time.monotonic() + _MODELS_FOR_S
        return models

    async def search(self, question: str, *, top_k: int, mode: SearchMode | None = None) -> Retrieved:
        return await self._call(lambda: self._retriever.search.remote(question, top_k, mode))

    async def embed(self, texts: Sequence[str], *, dimensions: int | None) -> Embeddings:
        embeddings: Embeddings = await self._call(lambda: self._retriever.embed.remote(texts, dimensions))
        self._charge(embeddings.num_tokens)
        note(prompt_tokens=embeddings.num_tokens)
        return embeddings

    async def documents(self, method: str, *args: Any) -> Any:
        """What `method` of the documents deployment answers. It is not asked again where its replica ends: the change
        may be made."""
        if self._documents is None:
            raise ApiError(NO_LIBRARY)
        deadline = asyncio.get_running_loop().time() + self.config.request_timeout_s
        return await self._call_once(getattr(self._documents, method).remote(*args), deadline)

    async def complete(self, request: GenerateRequest) -> tuple[Completion, CacheResult]:
        """The answer, and whether it came from the cache, or from an equal request that ran already."""
        completion, result = await self._completed(request)
        note(
            model=request.model,
            cache=result,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
        )
        return completion, result

    async def _completed(self, request: GenerateRequest) -> tuple[Completion, CacheResult]:
        await self._check_logprobs(request)
        key = await self._key(request)
        if key is None:
            self._cache.count("uncached")
            return await self._computed(key, request), "miss"
        if cached := await self._cache.get(key):
            self._cache.count(cached[1])
            return cached
        flight = self._flights.result(f"whole {key.exact}", lambda: self._computed(key, request))
        completion, is_anothers = await flight
        result: CacheResult = "hit" if is_anothers else "miss"
        self._cache.count(result)
        return completion, result

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Started | Piece, None]:
        """`Started`, then pieces, within `request_timeout_s` altogether. A cached answer is streamed as one piece."""
        await self._check_logprobs(request)
        key = await self._key(request)
        if key is None:
            self._cache.count("uncached")
            async with aclosing(self._streamed(key, request)) as items:
                async for item in items:
                    yield item
            return
        if cached := await self._cache.get(key):
            completion, result = cached
            self._cache.count(result)
            for piece in _replay(completion, result):
                yield piece
            return
        async with aclosing(self._flights.stream(key.exact, lambda: self._streamed(key, request))) as shared:
            async for item, is_anothers in shared:
                if isinstance(item, Started):
                    self._cache.count("hit" if is_anothers else "miss")
                yield replace(item, cache="hit") if is_anothers and isinstance(item, Started) else item

    async def _computed(self, key: AnswerKey | None, request: GenerateRequest) -> Completion:
        with self._shedding(request):
            completion = await self._call(lambda: self._generator.complete.remote(request))
        self._charge(completion.prompt_tokens + completion.completion_tokens)
        self._keep(key, completion)
        return completion

    async def _streamed(self, key: AnswerKey | None, request: GenerateRequest) -> AsyncGenerator[Started | Piece, None]:
        deadline = asyncio.get_running_loop().time() + self.config.request_timeout_s
        collector, num_tokens = None, 0
        try:
            with self._shedding(request):
                async with aclosing(self._generated(request, deadline)) as items:
                    async for item in items:
                        if isinstance(item, Started):
                            collector = Collector(item)
                            num_tokens += sum(prompt.num_tokens for prompt in item.prompts)
                        elif collector:
                            collector.add(item)
                            num_tokens += item.num_tokens
                        yield item
        finally:  # a client that leaves pays for what was computed
            self._charge(num_tokens)
        if collector:
            self._keep(key, collector.completion())

    @contextmanager
    def _shedding(self, request: GenerateRequest) -> Iterator[None]:
        """Around a request to the generator: refused at once where its queue has just refused another."""
        until, refusal = self._full.get(request.model, (0.0, None))
        if refusal is not None and time.monotonic() < until:
            raise ApiError(refusal)
        try:
            yield
        except ApiError as error:
            # many answers may find no room where one would
            if error.refusal.code == "queue_full" and request.num_choices == 1:
                now = time.monotonic()
                self._full = {model: full for model, full in self._full.items() if full[0] > now}
                self._full[request.model] = (now + _FULL_FOR_S, error.refusal)
            raise

    async def _generated(self, request: GenerateRequest, deadline: float) -> AsyncGenerator[Started | Piece, None]:
        """From one replica; from another if that one ends before anything has come of it."""
        has_begun = False
        try:
            async with aclosing(self._generated_once(request, deadline)) as items:
                async for item in items:
                    has_begun = True
                    yield item
        except ReplicaEnded as error:
            if has_begun:
                raise
            _tell_retry(error)
        else:
            return
        async with aclosing(self._generated_once(request, deadline)) as items:
            async for item in items:
                yield item

    async def _generated_once(self, request: GenerateRequest, deadline: float) -> AsyncGenerator[Started | Piece, None]:
        response = self._streaming.stream.remote(request)
        finished = False
        try:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        items: Items = await anext(response)
                except StopAsyncIteration:
                    finished = True
                    return
                except Exception as error:
                    raise self._api_error(error) from error
                for item in items:
                    yield _unless_refused(item)
        finally:
            if not finished:
                _cancel(response)

    async def _call(self, call: Callable[[], Any]) -> Any:
        """The result of what `call` starts; it is called once more where its replica ends before it answers. Not a
        third time: what it was asked may be what it ended of."""
        deadline = asyncio.get_running_loop().time() + self.config.request_timeout_s
        try:
            return await self._call_once(call(), deadline)
        except ReplicaEnded as error:
            _tell_retry(error)
        return await self._call_once(call(), deadline)

    async def _call_once(self, response: Any, deadline: float) -> Any:
        finished = False
        try:
            async with asyncio.timeout_at(deadline):
                result = await response
            finished = True
        except Exception as error:
            raise self._api_error(error) from error
        finally:
            if not finished:  # not waiting any longer does not end the work by itself
                _cancel(response)
        return _unless_refused(result)

    def _api_error(self, error: Exception) -> Exception:
        """What Serve and Ray raise, as an answer; what nobody foresaw, as it is."""
        if isinstance(error, TimeoutError):
            return ApiError(Refusal(504, _TIMEOUT.format(seconds=self.config.request_timeout_s), code="timeout"))
        if isinstance(error, BackPressureError):
            return ApiError(Refusal(429, "too many requests are waiting", code="queue_full", retry_after_s=1))
        if isinstance(error, RayActorError | ReplicaUnavailableError):
            return ReplicaEnded(_ENDED)
        if isinstance(error, DeploymentUnavailableError):
            return ApiError(Refusal(503, "a deployment has failed", code="unavailable", retry_after_s=5))
        return error

    async def _check_logprobs(self, request: GenerateRequest) -> None:
        """Those that the answers can have: none is longer than its model's context, whatever `max_tokens` allows."""
        if request.logprobs is None:
            return
        of_a_token = request.num_choices * (1 + request.logprobs)
        if of_a_token * request.max_tokens <= _MOST_LOGPROBS:
            return
        model = await self._loaded(request.model)
        # one that is registered and was not asked for yet stands on a base that is among the loaded ones
        known = self._models.values() if model is None else (model,)
        length = min(request.max_tokens, max((each.context_length for each in known), default=request.max_tokens))
        if of_a_token * length <= _MOST_LOGPROBS:
            return
        message = (
            f"{of_a_token * length} log-probabilities may be told ({request.num_choices} answers of {length} tokens, "
            f"{request.logprobs} alternatives each), more than {_MOST_LOGPROBS}; ask for fewer of any"
        )
        raise ApiError(Refusal(400, message, code="too_many_logprobs", param="logprobs"))

    def _charge(self, num_tokens: int) -> None:
        key = current_key.get()
        if self._limiter is not None and key is not None:
            self._limiter.charge(key, num_tokens)

    # --- the cache ---

    async def _key(self, request: GenerateRequest) -> AnswerKey | None:
        """None for a request whose answer must not be cached, or whose model is none that is loaded."""
        if not self._cache.takes(request):
            return None
        model = await self._loaded(request.model)
        if model is None:
            return None
        key = current_key.get()
        return self._cache.key(request, model_hash=model.hash, tenant=None if key is None else key.name)

    async def _loaded(self, name: str) -> ModelInfo | None:
        """What is known of the model, no longer than `_MODELS_FOR_S` ago. In use, it is asked before anyone waits."""
        left_s = self._models_until - time.monotonic()
        if name not in self._models or left_s < 0:
            await self.models()
        elif left_s < _MODELS_FOR_S / 2 and (self._refresh is None or self._refresh.done()):
            self._refresh = asyncio.get_running_loop().create_task(self._refreshed())
        return self._models.get(name)

    async def _refreshed(self) -> None:
        with suppress(ApiError):  # who needs it will be told
            await self.models()

    def _keep(self, key: AnswerKey | None, completion: Completion) -> None:
        if key is None:
            return
        if completion.model_hash != key.model_hash:
            self._models = {}  # promoted meanwhile, or a replica was replaced: the key is for the old weights
            return
        self._cache.put(key, completion)


class Stopwatch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.start = self._last = time.perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last

    def total(self) -> float:
        return time.perf_counter() - self.start


def _unless_refused(item: Any) -> Any:
    if not isinstance(item, Refusal):
        return item
    raise (ReplicaEnded if item.code == SHUTTING_DOWN else ApiError)(item)


def _tell_retry(error: ReplicaEnded) -> None:
    logger.warning(f"{error.refusal.message}; another one is asked")


def _cancel(response: Any) -> None:
    """End a call that nobody waits for. One that reached no replica raises once more why, which is told already."""
    with suppress(Exception):
        response.cancel()


def _replay(completion: Completion, result: CacheResult) -> list[Started | Piece]:
    started = Started(completion.model_hash, completion.prompts, result)
    pieces = [
        Piece(index, choice.text, choice.num_tokens, choice.finish_reason, choice.logprobs)
        for index, choice in enumerate(completion.choices)
    ]
    return [started, *pieces]
