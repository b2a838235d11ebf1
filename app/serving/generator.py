"""The generator deployment: models by name. Thin; the work is `model_library`'s and `served_model`'s. A plain class, as
all deployments here are: `application` puts it on Serve."""

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

import torch

from app.config import ApplicationConfig
from app.engine.deltas import DeltasFull, UnknownDelta
from app.engine.events import ContextLengthExceeded, InvalidRequest, QueueFull
from app.engine.front import EngineStopped, GenerationFailed
from app.errors import UserError
from app.serving.autoscaling import replica_load
from app.serving.messages import (
    SHUTTING_DOWN,
    ChatPrompt,
    Collector,
    Completion,
    GenerateRequest,
    Items,
    ModelInfo,
    Refusal,
    Started,
)
from app.serving.metrics import GeneratorMetrics
from app.serving.model_library import ModelLibrary
from app.serving.served_model import ServedModel
from app.serving.tracing import GenerationSpan

_REPORT_S = 1.0
"""How often queues and counts are told to Ray's metrics."""
_ATTEMPTS = 3
"""A model can be replaced or unloaded between its being found and its engine's being asked."""


T = TypeVar("T")


class GeneratorDeployment:
    def __init__(self, config: ApplicationConfig) -> None:
        torch.set_num_threads(config.generator.threads)
        self._max_choices = config.generator.max_batch_size + config.generator.max_queue
        self._refresh_s = config.generator.refresh_s
        self._library = ModelLibrary(config.generator, name=config.name)
        gc.collect()
        gc.freeze()  # a collection over all that is loaded would hold up every answer for a tenth of a second
        self._metrics = GeneratorMetrics()
        self._loads = ThreadPoolExecutor(1, thread_name_prefix="library")
        self._ending = threading.Event()
        threading.Thread(target=self._report, name="metrics", daemon=True).start()
        if self._library.has_aliases:
            threading.Thread(target=self._follow_aliases, name="registry", daemon=True).start()

    async def models(self) -> list[ModelInfo]:
        """Those that are loaded."""
        return [model.info for model in self._library.models.values()]

    async def stats(self) -> dict[str, dict[str, Any]]:
        """Queues and token counts of each engine, by the name of the first model on it."""
        return {name: vars(front.stats()) for name, front in self._library.fronts.items()}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve again and again, for `autoscaling.TokenLoad`."""
        return replica_load(front.stats() for front in self._library.fronts.values())

    async def complete(self, request: GenerateRequest) -> Completion | Refusal:
        """The whole answer. Cancelling the call aborts the generation."""
        collector = None
        async with aclosing(self._answered(request)) as messages:
            async for items in messages:
                for item in items:
                    if isinstance(item, Refusal):
                        return item
                    if isinstance(item, Started):
                        collector = Collector(item)
                    elif collector:
                        collector.add(item)
        assert collector, "a stream begins with Started or Refusal"
        return collector.completion()

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Items, None]:
        """`Started`, then pieces. A `Refusal` may come first, or where a failure ends the stream."""
        async with aclosing(self._answered(request)) as messages:
            async for items in messages:
                yield items

    async def _answered(self, request: GenerateRequest) -> AsyncGenerator[Items, None]:
        watch, span = self._metrics.watch(request.model), GenerationSpan(request)
        try:
            async with aclosing(self._tried(request)) as messages:
                async for items in messages:
                    for item in items:
                        watch.see(item, num_choices=request.num_choices)
                        span.see(item)
                    yield items
        finally:
            watch.end()
            span.end()

    async def _tried(self, request: GenerateRequest) -> AsyncGenerator[Items, None]:
        if request.num_choices > self._max_choices:
            yield (_too_many_choices(request, self._max_choices),)
            return
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                model = await self._find(request.model)
            except (UserError, DeltasFull) as error:
                yield (_unavailable_model(request.model, error),)
                return
            if model is None:
                yield (_unknown_model(request.model, list(self._library.models)),)
                return
            has_started = False
            try:
                async with aclosing(_answered(model, request)) as messages:
                    async for items in messages:
                        has_started = True
                        yield items
                return
            except (InvalidRequest, QueueFull, GenerationFailed) as error:
                yield (_refusal(error, model, request),)
                return
            except (UnknownDelta, EngineStopped) as error:
                is_gone = isinstance(error, EngineStopped) and self._library.get(request.model) is model
                if has_started or is_gone or attempt == _ATTEMPTS:
                    yield (_refusal(error, model, request),)
                    return
                if isinstance(error, UnknownDelta):
                    try:
                        await self._in_library(self._library.load_again, model)
                    except (UserError, DeltasFull) as full:
                        yield (_unavailable_model(request.model, full),)
                        return

    async def _find(self, name: str) -> ServedModel | None:
        return self._library.get(name) or await self._in_library(self._library.find, name)

    async def _in_library(self, work: Callable[..., T], *given: Any) -> T:
        """In a thread of its own, one after the other: a store that does not answer holds up no one's tokenization."""
        return await asyncio.get_running_loop().run_in_executor(self._loads, work, *given)

    def _report(self) -> None:
        while not self._ending.wait(_REPORT_S):
            self._metrics.set_engines({name: front.stats() for name, front in self._library.fronts.items()})

    def _follow_aliases(self) -> None:
        while not self._ending.wait(self._refresh_s):
            self._library.follow_aliases()

    def check_health(self) -> None:
        dead = [name for name, front in self._library.fronts.items() if not front.is_alive]
        if dead:
            raise RuntimeError(f"the engine of {', '.join(dead)} has ended")

    def __del__(self) -> None:
        if hasattr(self, "_ending"):
            self._ending.set()
            self._library.shutdown()


async def _answered(model: ServedModel, request: GenerateRequest) -> AsyncGenerator[Items, None]:
    prompts = await model.encode(request)
    started = Started(model.info.hash, tuple(info for _, info in prompts))
    is_first = True
    async with aclosing(model.generate(request, [ids for ids, _ in prompts])) as batches:
        async for pieces in batches:
            # only with the first of them is it certain that the engine has taken the request
            yield (started, *pieces) if is_first else pieces
            is_first = False


def _refusal(error: Exception, model: ServedModel, request: GenerateRequest) -> Refusal:
    message = str(error)
    param = "messages" if isinstance(request.prompts[0], ChatPrompt) else "prompt"
    if isinstance(error, ContextLengthExceeded):
        return Refusal(400, message, code="context_length_exceeded", param=param)
    if isinstance(error, InvalidRequest) and error.param is not None:
        return Refusal(400, message, code="invalid_value", param=error.param)
    if isinstance(error, InvalidRequest):
        return Refusal(400, message, code="invalid_prompt", param=param)
    if isinstance(error, QueueFull):
        return Refusal(429, message, code="queue_full", retry_after_s=model.retry_after_s())
    code = "generation_failed" if isinstance(error, GenerationFailed) else SHUTTING_DOWN
    return Refusal(503, message, code=code, retry_after_s=1)


def _unknown_model(name: str, known: list[str]) -> Refusal:
    message = f"model {name!r} does not exist; there are: {', '.join(known)}"
    return Refusal(404, message, code="model_not_found", param="model")


def _unavailable_model(name: str, error: Exception) -> Refusal:
    """It is registered, and cannot be had now, or at all until someone registers another."""
    message = f"model {name!r} cannot be loaded: {error}"
    return Refusal(503, message, code="model_unavailable", param="model", retry_after_s=5)


def _too_many_choices(request: GenerateRequest, limit: int) -> Refusal:
    message = f"{len(request.prompts)} prompts, {request.n} answers to each; this server gives at most {limit} at once"
    return Refusal(400, message, code="too_many_choices", param="n" if request.n > 1 else "prompt")
