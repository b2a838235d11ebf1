"""One request's state, what may be asked of the engine, and what it reports back."""

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

from app.engine.sampling import Sampling

FinishReason = Literal["stop", "length"]


class InvalidRequest(ValueError):
    """A request that this model can never answer."""


class ContextLengthExceeded(InvalidRequest):
    def __init__(self, *, prompt_length: int, context_length: int) -> None:
        super().__init__(
            f"the prompt has {prompt_length} tokens; the context of {context_length} must hold it and at least one "
            "generated token"
        )
        self.prompt_length = prompt_length
        self.context_length = context_length

    def __reduce__(self) -> tuple:
        # Exceptions with keyword arguments do not survive pickling by themselves, and servers send them on.
        return _context_length_exceeded, (self.prompt_length, self.context_length)


class QueueFull(Exception):
    """As many requests wait as may wait; try again later."""


@dataclass(frozen=True)
class Event:
    """One step of one request: a token, an end, or both at once."""

    request_id: int
    token: int | None
    """None where a stop token ended the request."""
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Sequence:
    """A request on its way: its tokens, how many of them are in the KV cache, and where."""

    request_id: int
    ids: list[int]
    """Prompt and generated tokens."""
    prompt_length: int
    max_length: int
    """Prompt and generated tokens at most; never beyond the context."""
    sampling: Sampling
    stream: random.Random = field(repr=False)
    slot: int | None = None
    """Its place in the KV cache while it runs."""
    num_cached: int = 0

    @property
    def uncached_ids(self) -> list[int]:
        """What the next step must compute: the whole prompt at first, then the newest token."""
        return self.ids[self.num_cached :]

    def append(self, token: int) -> Event:
        """Take a sampled token; the KV cache now holds all tokens before it. Returns what to report."""
        self.num_cached = len(self.ids)
        if token in self.sampling.stop_ids:
            return Event(self.request_id, None, "stop")
        self.ids.append(token)
        return Event(self.request_id, token, "length" if len(self.ids) >= self.max_length else None)


def new_sequence(
    request_id: int, ids: SequenceOf[int], sampling: Sampling, *, context_length: int, vocab_size: int
) -> Sequence:
    """A checked request; `max_tokens` is cut to what the context holds.

    Raises:
        ContextLengthExceeded: the prompt leaves no room for one token.
        InvalidRequest: the prompt is empty or holds ids that the vocabulary does not have.
    """
    if not ids:
        raise InvalidRequest("the prompt is empty; at least one token is needed")
    strange = next((token for token in ids if not 0 <= token < vocab_size), None)
    if strange is not None:
        raise InvalidRequest(f"token id {strange} is outside the vocabulary of {vocab_size}")
    if len(ids) + 1 > context_length:
        raise ContextLengthExceeded(prompt_length=len(ids), context_length=context_length)
    return Sequence(
        request_id=request_id,
        ids=list(ids),
        prompt_length=len(ids),
        max_length=min(len(ids) + sampling.max_tokens, context_length),
        sampling=sampling,
        stream=sampling.stream(),
    )


def _context_length_exceeded(prompt_length: int, context_length: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(prompt_length=prompt_length, context_length=context_length)
