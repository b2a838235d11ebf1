"""The generator deployment: one engine per model name. Thin; the work is `served_model`'s. A plain class, as all
deployments here are: `application` puts it on Serve."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import torch

from app.config import ApplicationConfig
from app.engine.front import EngineStopped, GenerationFailed
from app.engine.sequence import ContextLengthExceeded, InvalidRequest, QueueFull
from app.serving.messages import Collector, Completion, GenerateRequest, ModelInfo, Piece, Refusal, Started
from app.serving.served_model import ServedModel, load_models


class GeneratorDeployment:
    def __init__(self, config: ApplicationConfig) -> None:
        torch.set_num_threads(config.generator.threads)
        self._max_prompts = config.generator.max_batch_size + config.generator.max_queue
        self._models = load_models(config.generator, name=config.name)

    async def models(self) -> list[ModelInfo]:
        return [model.info for model in self._models.values()]

    async def stats(self) -> dict[str, dict[str, int]]:
        """Queues and token counts by model."""
        return {name: vars(model.front.stats()) for name, model in self._models.items()}

    async def complete(self, request: GenerateRequest) -> Completion | Refusal:
        """The whole answer. Cancelling the call aborts the generation."""
        collector = None
        async with aclosing(self.stream(request)) as items:
            async for item in items:
                if isinstance(item, Refusal):
                    return item
                if isinstance(item, Started):
                    collector = Collector(item)
                elif collector:
                    collector.add(item)
        assert collector, "a stream begins with Started or Refusal"
        return collector.completion()

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Started | Piece | Refusal, None]:
        """`Started`, then pieces. A `Refusal` may come first, or where a failure ends the stream."""
        model = self._models.get(request.model)
        if model is None:
            yield _unknown_model(request.model, list(self._models))
            return
        if len(request.prompts) > self._max_prompts:
            yield _too_many_prompts(len(request.prompts), self._max_prompts)
            return
        try:
            prompts = await model.encode(request)
            started = Started(model.info.hash, tuple(info for _, info in prompts))
            async with aclosing(model.generate(request, [ids for ids, _ in prompts])) as pieces:
                is_first = True
                async for piece in pieces:
                    if is_first:  # only now is it certain that the engine has taken the request
                        yield started
                    is_first = False
                    yield piece
        except (InvalidRequest, QueueFull, GenerationFailed, EngineStopped) as error:
            yield _refusal(error, model)

    def check_health(self) -> None:
        dead = [name for name, model in self._models.items() if not model.front.is_alive]
        if dead:
            raise RuntimeError(f"the engine of {', '.join(dead)} has ended")

    def __del__(self) -> None:
        for model in getattr(self, "_models", {}).values():
            model.front.shutdown()


def _refusal(error: Exception, model: ServedModel) -> Refusal:
    message = str(error)
    if isinstance(error, ContextLengthExceeded):
        return Refusal(400, message, code="context_length_exceeded", param="prompt")
    if isinstance(error, InvalidRequest):
        return Refusal(400, message, code="invalid_prompt", param="prompt")
    if isinstance(error, QueueFull):
        return Refusal(429, message, code="queue_full", retry_after_s=model.retry_after_s())
    code = "generation_failed" if isinstance(error, GenerationFailed) else "shutting_down"
    return Refusal(503, message, code=code, retry_after_s=1)


def _unknown_model(name: str, known: list[str]) -> Refusal:
    message = f"model {name!r} does not exist; there are: {', '.join(known)}"
    return Refusal(404, message, code="model_not_found", param="model")


def _too_many_prompts(count: int, limit: int) -> Refusal:
    message = f"{count} prompts in one request; this server takes at most {limit}"
    return Refusal(400, message, code="too_many_prompts", param="prompt")
