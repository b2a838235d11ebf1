"""The engine: add requests, call `step` until there is no work. One thread at a time; `front` gives it one."""

import itertools
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from app.engine.blocks import BLOCK_SIZE, blocks_for
from app.engine.decoding import Decoding
from app.engine.deltas import Deltas, MixedModel, Variant
from app.engine.events import Event, InvalidRequest
from app.engine.gpu import decoding_for, paged_attention_for
from app.engine.kernels import kernels_for
from app.engine.kv_cache import KVCache
from app.engine.packing import can_pack, packed_head
from app.engine.runner import Runner
from app.engine.sampling import Choice, Sampling, sample, torch_argmax
from app.engine.scheduler import Scheduler
from app.engine.sequence import Sequence, check_request
from app.engine.step_time import AnswerLength, StepTime, queued_s
from app.errors import UserError
from app.methods.delta import Delta
from app.models.decoder import Decoder

_KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class EngineSettings:
    max_batch_size: int = 64
    """Answers that are generated together."""
    max_queue: int = 128
    """Answers that may wait beyond those that the batch has room for."""
    max_queued_tokens: int | None = None
    """Prompt and answer tokens that those who wait may take together, beyond those that the batch has room for."""
    max_step_tokens: int = 512
    """Rows that one step computes at most, above `max_batch_size`; longer prompts are read in several."""
    max_kv_bytes: int | None = None
    """Of the KV cache; None: room for `max_batch_size` whole contexts."""
    prefault_kv: bool = False
    """On a CPU: take the cache's memory when the engine is made. Else it is taken page by page, as it is first used,
    for which the first requests wait (on a virtual machine for a tenth of their time), and it may run out late."""
    kv_dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """auto: the weights' own. int8, on a CPU: half of bf16's memory; keys and values are rounded, each by itself."""
    reuse_prefixes: bool = True
    """Whether a prompt that begins like an earlier one finds what was computed there."""
    max_delta_bytes: int | None = None
    """Of the loaded deltas; the least recently used are unloaded beyond it."""
    max_extra_blocks: int = 1
    """As many as a delta may add to the base's."""
    kernels: Literal["auto", "torch"] = "auto"
    """auto: the engine's own, compiled, and oneDNN's packed weights, where they suit the model and the machine."""
    cuda_graphs: bool = True
    """On a GPU with the engine's kernels: steps that only continue the base's answers are recorded and replayed."""
    int8_head: bool = False
    """Compute logits from a rounded copy of the token embedding, as an int8 model's other layers are."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_queue", "max_queued_tokens", "max_step_tokens", "max_kv_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True)
class Stats:
    """A snapshot of the queues, and counts since the start."""

    waiting: int
    running: int
    free_slots: int
    queued_tokens: int
    """Prompt and answer tokens that those who wait may take."""
    blocks: int
    """Of the KV cache, 16 tokens each."""
    free_blocks: int
    """Held by no running request; most still contain what they may be found for."""
    steps: int
    computed_tokens: int
    """Rows that went through the model: prompt tokens once, then one per generated token."""
    reused_tokens: int
    """Prompt tokens that were found in the cache instead."""
    generated_tokens: int
    preemptions: int
    deltas: int
    delta_bytes: int
    fixed_s: float
    """Seconds of a step, as those of the last minutes tell: whatever the number of running answers,"""
    answer_s: float
    """and for each of them, its prompt's share included."""
    queued_s: float
    """That full batches would need for those who wait, if their answers are as long as the last ones were."""


class Engine:
    """Continuous batching over one model: a request joins while others decode, and leaves at its own end.

    `token_bytes` is the vocabulary's text, for requests that a text should stop.
    """

    def __init__(
        self,
        model: Decoder,
        settings: EngineSettings | None = None,
        *,
        token_bytes: SequenceOf[bytes] | None = None,
        **changes: Any,
    ) -> None:
        settings = replace(settings or EngineSettings(), **changes)
        self.settings = settings
        self._context_length, self.vocab_size = model.config.context_length, model.config.vocab_size
        self._token_bytes = token_bytes
        weight = model.token_embedding.weight
        dtype = weight.dtype if settings.kv_dtype == "auto" else _KV_DTYPES[settings.kv_dtype]
        if dtype == torch.int8 and weight.device.type != "cpu":
            raise UserError(f"kv_dtype: int8 is for a CPU, and the model is on {weight.device.type}; take bf16 there")
        head_width = model.config.head_width
        if dtype == torch.int8 and head_width % 4:
            raise UserError(
                f"kv_dtype: int8 is for heads a multiple of 4 wide, and the model's are {head_width}; take bf16"
            )
        kernels = paged = None
        if settings.kernels == "auto":
            kernels = kernels_for(model.config, cache_dtype=dtype, dtype=weight.dtype, device=weight.device)
            paged = paged_attention_for(
                model.config,
                cache_dtype=dtype,
                dtype=weight.dtype,
                device=weight.device,
                max_rows=settings.max_batch_size,
            )
        is_packed = settings.kernels == "auto" and can_pack(weight.dtype, weight.device)
        head = packed_head(model, kernels, is_int8=settings.int8_head, is_packed=is_packed)
        mixed = MixedModel(
            model.eval(), num_extra_layers=settings.max_extra_blocks, kernels=kernels, is_packed=is_packed
        )
        self.deltas = Deltas(mixed, max_bytes=settings.max_delta_bytes)
        cache = KVCache(
            model.config,
            num_blocks=_num_blocks(model, settings, dtype),
            num_extra_layers=settings.max_extra_blocks,
            dtype=dtype,
            device=weight.device,
            reuse=settings.reuse_prefixes,
            prefault=settings.prefault_kv,
        )
        self._scheduler = Scheduler(
            cache,
            max_batch_size=settings.max_batch_size,
            max_queue=settings.max_queue,
            max_queued_tokens=settings.max_queued_tokens,
            max_step_tokens=max(settings.max_step_tokens, settings.max_batch_size + BLOCK_SIZE),
        )
        self._cache = cache
        self._runner = Runner(mixed, head, cache, kernels, paged=paged)
        self._decoding: Decoding | None = None
        if paged is not None and settings.cuda_graphs:
            max_blocks = blocks_for(model.config.context_length)
            self._decoding = decoding_for(
                model, head, cache, paged, max_rows=settings.max_batch_size, max_blocks=max_blocks
            )
        self._argmax = torch_argmax if kernels is None else kernels.argmax
        self._requests: dict[int, list[Sequence]] = {}
        self._ids, self._arrivals = itertools.count(), itertools.count()
        self._steps = self._computed = self._generated = 0
        self._step_time, self._answer_length = StepTime(), AnswerLength()

    def add_request(
        self, ids: SequenceOf[int], sampling: Sampling, delta: str | None = None, *, priority: int = 0
    ) -> int:
        """Queue a prompt; returns the id that its events and `abort` use.

        `delta` is the hash of one that is loaded; None: the model as it is. Smaller priorities go first, and may take
        the place of larger ones that run.

        Raises:
            InvalidRequest: the prompt is empty, too long (`ContextLengthExceeded`) or not of this vocabulary.
            UnknownDelta: the delta is not loaded.
            QueueFull: too many wait already.
        """
        variant = self.deltas.get(delta)
        context_length = self._context_length - variant.prefix_length
        check_request(
            ids,
            sampling,
            context_length=context_length,
            vocab_size=self.vocab_size,
            has_texts=self._token_bytes is not None,
        )
        max_length = min(len(ids) + sampling.max_tokens, context_length)
        self._check_fits(variant, max_length)
        self._scheduler.check_room(sampling.n, max_length)
        request_id = next(self._ids)
        answers: list[Sequence] = []
        for index in range(sampling.n):
            answers.append(
                Sequence(
                    request_id=request_id,
                    index=index,
                    ids=list(ids),
                    prompt_length=len(ids),
                    max_length=max_length,
                    sampling=sampling,
                    variant=variant,
                    rank=(priority, next(self._arrivals)),
                    leader=answers[0] if answers else None,
                )
            )
            self._scheduler.add(answers[-1])
        variant.num_requests += 1
        self._requests[request_id] = answers
        return request_id

    def step(self) -> list[Event]:
        """Compute the next token of every running answer, and a piece of the prompts that wait for theirs."""
        began = time.perf_counter()
        sequences = self._scheduler.schedule()
        if not sequences:
            return []
        num_running = self.num_running
        num_computed = sum(sequence.num_scheduled for sequence in sequences)
        sampling, choices = self._compute(sequences)
        for sequence in sequences:
            self._cache.computed(sequence)
        self._steps += 1
        self._computed += num_computed
        events = []
        for sequence, choice in zip(sampling, choices, strict=True):
            event = sequence.append(choice, self._token_bytes, step=self._steps)
            self._generated += event.token is not None
            events.append(event)
            if event.finish_reason:
                self._answer_length.observe(len(sequence.ids) - sequence.prompt_length)
                self._scheduler.remove(sequence)
                self._forget(sequence)
        self._step_time.observe(num_running, time.perf_counter() - began)
        return events

    def _compute(self, sequences: list[Sequence]) -> tuple[list[Sequence], list[Choice]]:
        """What is scheduled; those that have a next token now, and which."""
        if self._decoding is not None:
            if self._decoding.suits(sequences):
                return sequences, self._decoding.choices(sequences, may_look_ahead=not self._scheduler.waiting)
            self._decoding.forget()
        sampling, logits = self._runner.run(sequences)
        return sampling, sample(logits, sampling, argmax=self._argmax) if sampling else []

    def abort(self, request_id: int) -> bool:
        """Drop a request and release what it holds; False if it is not here (any more)."""
        answers = list(self._requests.get(request_id, ()))
        for sequence in answers:
            self._scheduler.remove(sequence)
            self._forget(sequence)
        return bool(answers)

    def abort_all(self) -> list[int]:
        """Drop every request, waiting or running; returns their ids."""
        request_ids = list(self._requests)
        for request_id in request_ids:
            self.abort(request_id)
        return request_ids

    def prepare_delta(self, delta: Delta) -> Variant:
        """What `add_delta` takes. It changes nothing, and may run in another thread than the engine's.

        Raises:
            UserError: the delta does not fit the model, or cannot share a batch with it, or its prefix leaves no room
                in the context or the cache.
        """
        variant = self.deltas.model.variant(delta)
        length, there = variant.prefix_length, self._cache.pool.num_blocks
        if length + 2 > self._context_length:
            raise UserError(f"the delta's prefix of {length} leaves no room in the context")
        if blocks_for(length + 2) > there:
            raise UserError(
                f"the delta's prefix of {length} tokens, and two behind it, take {blocks_for(length + 2)} blocks of "
                f"the KV cache, and max_kv_bytes={self.settings.max_kv_bytes} holds {there}; raise it"
            )
        return variant

    def add_delta(self, delta: Delta | Variant, *, pin: bool = False) -> str:
        """Load a delta while requests run; returns its hash. A pinned one stays until it is unpinned.

        Raises:
            UserError: as `prepare_delta`, or it is larger than `max_delta_bytes`.
            DeltasFull: those that are pinned or in use leave no room.
        """
        variant = self.prepare_delta(delta) if isinstance(delta, Delta) else delta
        self.deltas.add(variant, pin=pin)
        return variant.hash

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Answers that are being generated; not those that wait."""
        return len(self._scheduler.running)

    def stats(self) -> Stats:
        scheduler, pool = self._scheduler, self._cache.pool
        waiting = len(scheduler.waiting)
        return Stats(
            waiting=waiting,
            running=len(scheduler.running),
            free_slots=scheduler.free_slots,
            queued_tokens=scheduler.queued_tokens,
            blocks=pool.num_blocks,
            free_blocks=pool.num_free,
            steps=self._steps,
            computed_tokens=self._computed,
            reused_tokens=self._cache.num_reused_tokens,
            generated_tokens=self._generated,
            preemptions=scheduler.num_preemptions,
            deltas=len(self.deltas.loaded),
            delta_bytes=self.deltas.num_bytes,
            fixed_s=self._step_time.fixed_s,
            answer_s=self._step_time.answer_s,
            queued_s=queued_s(
                self._step_time,
                self._answer_length,
                waiting=waiting,
                queued_tokens=scheduler.queued_tokens,
                places=self.settings.max_batch_size,
            ),
        )

    def _check_fits(self, variant: Variant, max_length: int) -> None:
        """Whether the cache could hold it alone: else it would wait for ever."""
        there = self._cache.pool.num_blocks
        if blocks_for(variant.prefix_length + max_length) > there:
            prefix = f" behind a prefix of {variant.prefix_length}" if variant.prefix_length else ""
            raise InvalidRequest(
                f"prompt and answer may take {max_length} tokens{prefix}; the KV cache holds {there * BLOCK_SIZE} in "
                "all: ask for fewer tokens, or raise max_kv_bytes"
            )

    def _forget(self, sequence: Sequence) -> None:
        answers = self._requests[sequence.request_id]
        answers.remove(sequence)
        if not answers:
            del self._requests[sequence.request_id]
            sequence.variant.num_requests -= 1


def _num_blocks(model: Decoder, settings: EngineSettings, dtype: torch.dtype) -> int:
    if settings.max_kv_bytes is None:
        return settings.max_batch_size * blocks_for(model.config.context_length)
    size = KVCache.block_bytes(model.config, num_extra_layers=settings.max_extra_blocks, dtype=dtype)
    if settings.max_kv_bytes < size:
        raise UserError(
            f"max_kv_bytes={settings.max_kv_bytes} holds no block of 16 tokens, which takes {size}; raise it"
        )
    return settings.max_kv_bytes // size
