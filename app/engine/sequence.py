"""One answer's state, what may be asked of the engine, and what it reports back."""

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

from app.engine.deltas import Variant
from app.engine.sampling import Choice, Sampling

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
    """One step of one answer: a token, an end, or both at once."""

    request_id: int
    token: int | None
    """None where a stop token ended the answer."""
    finish_reason: FinishReason | None = None
    index: int = 0
    """Which of the request's `n` answers."""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    stop: int | str | None = None
    """The stop token or text that ended the answer."""


@dataclass(eq=False)
class Sequence:
    """An answer on its way: its tokens, how many of them are in the KV cache, and where."""

    request_id: int
    index: int
    ids: list[int]
    """Prompt and generated tokens."""
    prompt_length: int
    max_length: int
    """Prompt and generated tokens at most; never beyond the context."""
    sampling: Sampling
    variant: Variant
    rank: tuple[int, int]
    """(priority, order of arrival): the smaller goes first."""
    leader: "Sequence | None" = None
    """The request's first answer, which computes the prompt for all of them."""
    stream: random.Random = field(init=False, repr=False)
    blocks: list[int] = field(default_factory=list)
    """Its places in the KV cache while it runs, 16 tokens each, those of the prefix among them."""
    block_keys: list[bytes] = field(default_factory=list, repr=False)
    """What the full ones among its blocks hold; see `blocks.block_key`."""
    num_cached: int = 0
    num_scheduled: int = 0
    """Tokens that this step computes."""
    tail: bytes = b""
    """The end of the answer's text, as much as the beginning of a stop text could take."""

    def __post_init__(self) -> None:
        self.stream = self.sampling.stream(self.index)

    @property
    def prompt(self) -> list[int]:
        return self.ids[: self.prompt_length]

    @property
    def answer(self) -> list[int]:
        return self.ids[self.prompt_length :]

    @property
    def scheduled_ids(self) -> list[int]:
        """What the step computes: a piece of the prompt at first, then the newest token."""
        return self.ids[self.num_cached : self.num_cached + self.num_scheduled]

    @property
    def will_sample(self) -> bool:
        """Whether the step computes the newest token, whose logits tell the next."""
        return self.num_cached + self.num_scheduled == len(self.ids)

    @property
    def has_computed_prompt(self) -> bool:
        return self.num_cached >= self.prompt_length

    def append(self, choice: Choice, token_bytes: SequenceOf[bytes] | None) -> Event:
        """Take a sampled token; returns what to report. `token_bytes` are the vocabulary's, where texts may stop it."""
        if choice.token in self.sampling.ends:
            return Event(self.request_id, None, "stop", self.index, stop=choice.token)
        self.ids.append(choice.token)
        reason: FinishReason | None = "length" if len(self.ids) >= self.max_length else None
        stop = None
        if self.sampling.stop:
            assert token_bytes is not None  # looked at when the request came
            stop = self._stop_text(token_bytes[choice.token])
            reason = "stop" if stop is not None else reason
        return Event(self.request_id, choice.token, reason, self.index, choice.logprob, choice.top_logprobs, stop)

    def _stop_text(self, new: bytes) -> str | None:
        text = self.tail + new
        longest = max(len(stop.encode()) for stop in self.sampling.stop)
        self.tail = text[max(0, len(text) - longest + 1) :]
        found = [(place, stop) for stop in self.sampling.stop if (place := text.find(stop.encode())) >= 0]
        return min(found)[1] if found else None


def check_request(
    ids: SequenceOf[int], sampling: Sampling, *, context_length: int, vocab_size: int, has_texts: bool
) -> None:
    """
    Raises:
        ContextLengthExceeded: the prompt leaves no room for one token.
        InvalidRequest: the prompt is empty, or ids are outside the vocabulary, or texts should stop it and there are
            none.
    """
    if not ids:
        raise InvalidRequest("the prompt is empty; at least one token is needed")
    for what, tokens in (("token id", ids), ("logit_bias: token id", sampling.logit_bias)):
        strange = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if strange is not None:
            raise InvalidRequest(f"{what} {strange} is outside the vocabulary of {vocab_size}")
    if len(ids) + 1 > context_length:
        raise ContextLengthExceeded(prompt_length=len(ids), context_length=context_length)
    if sampling.stop and not has_texts:
        raise InvalidRequest(f"stop={sampling.stop[0]!r}: this engine does not know its tokens' texts; use stop_ids")


def _context_length_exceeded(prompt_length: int, context_length: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(prompt_length=prompt_length, context_length=context_length)
