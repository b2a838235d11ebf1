"""The engine: add requests, call `step` until there is no work. One thread at a time; `front` gives it one."""

import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.kv_cache import KVCache
from app.engine.runner import Runner
from app.engine.sampling import Sampling, sample
from app.engine.scheduler import Scheduler
from app.engine.sequence import Event, Sequence, new_sequence
from app.models.attention import KeysValues
from app.models.decoder import Decoder


@dataclass(frozen=True)
class Stats:
    """A snapshot of the queues, and counts since the start."""

    waiting: int
    running: int
    free_slots: int
    steps: int
    computed_tokens: int
    """Rows that went through the model: prompt tokens once, then one per generated token."""
    generated_tokens: int


class Engine:
    """Continuous batching over one model: a request joins while others decode, and leaves at its own end."""

    def __init__(self, model: Decoder, *, max_batch_size: int, max_queue: int) -> None:
        weight = model.token_embedding.weight
        self.max_length, self.vocab_size = model.max_length, model.config.vocab_size
        cache = KVCache(
            model.config,
            num_slots=max_batch_size,
            dtype=weight.dtype,
            device=weight.device,
            prefix=_prefix_of(model),
        )
        self._scheduler = Scheduler(cache, max_queue=max_queue)
        self._runner = Runner(model.eval(), cache)
        self._ids = itertools.count()
        self._steps = self._computed = self._generated = 0

    def add_request(self, ids: SequenceOf[int], sampling: Sampling) -> int:
        """Queue a prompt; returns the id that its events and `abort` use.

        Raises:
            InvalidRequest: the prompt is empty, too long (`ContextLengthExceeded`) or not of this vocabulary.
            QueueFull: too many wait already.
        """
        sequence = new_sequence(
            next(self._ids),
            ids,
            sampling,
            context_length=self.max_length,
            vocab_size=self.vocab_size,
        )
        self._scheduler.add(sequence)
        return sequence.request_id

    def step(self) -> list[Event]:
        """One token for every running sequence; those that wait join as far as there are free slots."""
        sequences = self._scheduler.schedule()
        if not sequences:
            return []
        logits = self._runner.run(sequences)
        return self._postprocess(sequences, logits)

    def abort(self, request_id: int) -> bool:
        """Drop a request and free its slot; False if it is not here (any more)."""
        return self._scheduler.remove(request_id)

    def abort_all(self) -> list[int]:
        """Drop every request, waiting or running; returns their ids."""
        request_ids = [*self._scheduler.running, *self._scheduler.waiting]
        for request_id in request_ids:
            self.abort(request_id)
        return request_ids

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def stats(self) -> Stats:
        return Stats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            free_slots=self._scheduler.cache.num_free,
            steps=self._steps,
            computed_tokens=self._computed,
            generated_tokens=self._generated,
        )

    def _postprocess(self, sequences: SequenceOf[Sequence], logits: Tensor) -> list[Event]:
        tokens = sample(logits, [s.sampling for s in sequences], [s.stream for s in sequences])
        self._steps += 1
        self._computed += sum(len(s.uncached_ids) for s in sequences)
        events = [sequence.append(token) for sequence, token in zip(sequences, tokens, strict=True)]
        self._generated += sum(event.token is not None for event in events)
        for event in events:
            if event.finish_reason:
                self._scheduler.remove(event.request_id)
        return events


@torch.inference_mode()
def _prefix_of(model: Decoder) -> SequenceOf[KeysValues]:
    """What the model puts before every sequence, computed once."""
    return () if model.prefix is None else model.prefix(model)
