"""One model that answers requests: text in, text out, an engine inside. Knows no Ray and no HTTP."""

import asyncio
import hashlib
import json
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch

from app.assets import model_folder
from app.config import GeneratorConfig
from app.data.prompts import PacosTemplate, Template, template_from_json
from app.data.tokenization import Tokenizer, load_tokenizer
from app.engine.engine import Engine
from app.engine.front import EngineFront
from app.engine.sampling import Sampling
from app.engine.sequence import ContextLengthExceeded
from app.errors import UserError
from app.methods.delta import Delta, check_base, fold_delta, read_delta
from app.models.checkpoints import load_decoder, read_provenance, weights_hash
from app.models.decoder import Decoder
from app.serving.messages import GenerateRequest, ModelInfo, Piece, Prompt, PromptInfo, RagPrompt
from app.serving.registered_deltas import delta_folder
from app.serving.streams import merge
from app.serving.text_stream import TextStream


def load_models(config: GeneratorConfig, *, name: str) -> dict[str, "ServedModel"]:
    """The base model as `name`, and each delta applied to a copy of it as `name:DELTA`.

    Raises:
        UserError: a folder is missing or damaged, or a delta is not registered, or of another base or tokenizer.
    """
    folder = model_folder(config.model)
    tokenizer = load_tokenizer(folder)
    base_hash = weights_hash(folder)
    template = template_of(read_provenance(folder))
    models = {name: _serve(name, load_decoder(folder), tokenizer, template, base_hash, config)}
    for delta_name, source in config.deltas.items():
        model, delta = load_with_delta(folder, delta_folder(source, config.tracking), base_hash, tokenizer)
        template = template_of(delta.metadata)
        full_name = f"{name}:{delta_name}"
        models[full_name] = _serve(full_name, model, tokenizer, template, base_hash + delta.hash, config)
    return models


def template_of(metadata: dict[str, Any]) -> Template:
    """The one that a model says it was tuned with."""
    stored = metadata.get("template")
    return template_from_json(stored) if stored else PacosTemplate()


def _serve(
    name: str, model: Decoder, tokenizer: Tokenizer, template: Template, weights: str, config: GeneratorConfig
) -> "ServedModel":
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"model={config.model!r}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{model.config.vocab_size}; their files do not belong together"
        )
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    engine = Engine(model.to(config.device, dtype), max_batch_size=config.max_batch_size, max_queue=config.max_queue)
    identity = ":".join([weights, tokenizer.fingerprint(), config.precision, json.dumps(template.to_json())])
    model_hash = hashlib.sha256(identity.encode()).hexdigest()
    info = ModelInfo(name, model_hash, model.max_length, template.to_json())
    return ServedModel(info, EngineFront(engine, name=f"engine {name}"), tokenizer, template)


def load_with_delta(folder: Path, trained: Path, base_hash: str, tokenizer: Tokenizer) -> tuple[Decoder, Delta]:
    delta = read_delta(trained)
    check_base(
        delta,
        str(trained),
        base_hash=base_hash,
        tokenizer_hash=tokenizer.fingerprint(),
    )
    model = load_decoder(folder)  # in fp32, whatever is served: merging rounds only once
    fold_delta(model, delta)
    return model.requires_grad_(False).eval(), delta


class ServedModel:
    def __init__(self, info: ModelInfo, front: EngineFront, tokenizer: Tokenizer, template: Template) -> None:
        self.info = info
        self.front = front
        self.tokenizer = tokenizer
        self.template = template
        self._mean_duration_s = 1.0

    async def encode(self, request: GenerateRequest) -> list[tuple[list[int], PromptInfo]]:
        """Token ids of each prompt. Long texts take a while, so this is off the event loop."""
        return await asyncio.to_thread(lambda: [self._encode(prompt, request.max_tokens) for prompt in request.prompts])

    async def generate(self, request: GenerateRequest, prompts: Sequence[list[int]]) -> AsyncGenerator[Piece, None]:
        """Pieces of all prompts' answers as they come.

        Raises:
            InvalidRequest, QueueFull, GenerationFailed, EngineStopped: as `EngineFront.generate`; one prompt's
                exception ends all.
        """
        answers = [self._answer(index, ids, request) for index, ids in enumerate(prompts)]
        stream = answers[0] if len(answers) == 1 else merge(answers)
        async with aclosing(stream):
            async for piece in stream:
                yield piece

    def retry_after_s(self) -> int:
        """Seconds until a refused request has a chance, from the queue and how long answers took lately."""
        stats = self.front.stats()
        rounds = stats.waiting / max(1, stats.running)
        return max(1, min(60, math.ceil(rounds * self._mean_duration_s)))

    async def _answer(self, index: int, ids: list[int], request: GenerateRequest) -> AsyncGenerator[Piece, None]:
        text = TextStream(self.tokenizer, stop=request.stop)
        sampling = Sampling(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
            stop_ids=frozenset({self.tokenizer.end_id}),
        )
        start = time.monotonic()
        unreported = 0  # tokens whose text is still held back
        async with aclosing(self.front.generate(ids, sampling)) as events:
            async for event in events:
                new = ""
                if event.token is not None:
                    unreported += 1
                    new = text.push(event.token)
                reason = event.finish_reason
                if reason and not text.stopped:
                    new += text.finish()
                if text.stopped:
                    reason = "stop"
                if new or reason:
                    yield Piece(index, new, unreported, reason)
                    unreported = 0
                if reason:
                    break
        self._mean_duration_s += 0.1 * (time.monotonic() - start - self._mean_duration_s)

    def _encode(self, prompt: Prompt, max_tokens: int) -> tuple[list[int], PromptInfo]:
        if isinstance(prompt, RagPrompt):
            return self._encode_question(prompt, max_tokens)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return ids, PromptInfo(len(ids))

    def _encode_question(self, prompt: RagPrompt, max_tokens: int) -> tuple[list[int], PromptInfo]:
        """The template with as many passages as leave room for the answer, which gets half the context at most.

        Raises:
            ContextLengthExceeded: the question alone leaves no room.
        """
        context_length = self.info.context_length
        room = min(max_tokens, context_length // 2)
        ids = self._render(prompt.question, ())
        if len(ids) >= context_length:
            raise ContextLengthExceeded(prompt_length=len(ids), context_length=context_length)
        num_passages = 0
        for count in range(1, len(prompt.passages) + 1):
            longer = self._render(prompt.question, prompt.passages[:count])
            if len(longer) + room > context_length:
                break
            ids, num_passages = longer, count
        return ids, PromptInfo(len(ids), num_passages)

    def _without_marks(self, text: str) -> str:
        """`text` without what the tokenizer takes for its own marks, such as the end of text."""
        for token in self.tokenizer.special_tokens:
            text = text.replace(token, " ")
        return text

    def _render(self, question: str, passages: Sequence[str]) -> list[int]:
        # On one line, as in the records that models are tuned on; so no passage can forge a line of the template.
        lines = (" ".join(self._without_marks(text).split()) for text in passages)
        question = self._without_marks(question).strip()
        return self.tokenizer.encode(self.template.prompt(question, " ".join(lines)))
