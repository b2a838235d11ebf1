"""One answer's state, and what may be asked of the engine."""

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from app.engine.deltas import Variant
from app.engine.events import ContextLengthExceeded, Event, FinishReason, InvalidRequest
from app.engine.sampling import Choice, Sampling


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

    def append(self, choice: Choice, token_bytes: SequenceOf[bytes] | None, *, step: int) -> Event:
        """Take a token that `step` sampled; returns what to report. `token_bytes` are the vocabulary's, where texts may
        stop it."""
        if choice.token in self.sampling.ends:
            return Event(self.request_id, None, "stop", self.index, stop=choice.token, step=step)
        self.ids.append(choice.token)
        reason: FinishReason | None = "length" if len(self.ids) >= self.max_length else None
        stop = None
        if self.sampling.stop:
            assert token_bytes is not None  # looked at when the request came
            stop = self._stop_text(token_bytes[choice.token])
            reason = "stop" if stop is not None else reason
        return Event(self.request_id, choice.token, reason, self.index, choice.logprob, choice.top_logprobs, stop, step)

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
    for what, tokens, param in (("token id", ids, None), ("logit_bias: token id", sampling.logit_bias, "logit_bias")):
        strange = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if strange is not None:
            raise InvalidRequest(f"{what} {strange} is outside the vocabulary of {vocab_size}", param=param)
    if len(ids) + 1 > context_length:
        raise ContextLengthExceeded(prompt_length=len(ids), context_length=context_length)
    if sampling.stop and not has_texts:
        raise InvalidRequest(f"stop={sampling.stop[0]!r}: this engine does not know its tokens' texts; use stop_ids")
