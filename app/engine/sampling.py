"""From logits to the next token ids. Each sequence draws from a random stream of its own."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

_MOST_TOP_LOGPROBS = 100
_CANDIDATES = 1024
"""How many of the likeliest tokens are ordered for top-p; a row where they do not hold p is ordered as a whole."""


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen and when it ends.

    Chosen in this order: penalties and bias change the logits, temperature divides them, `top_k`, then `top_p` of what
    is left, then `min_p` say which tokens can be drawn.
    """

    max_tokens: int
    n: int = 1
    """Answers to the same prompt, each with a stream of its own."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens can be drawn."""
    top_p: float = 1.0
    """Only the likeliest tokens that together hold this probability can be drawn (Holtzman et al. 2019)."""
    min_p: float = 0.0
    """Only tokens of at least this share of the likeliest one's probability (Nguyen et al. 2024, arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides a positive logit, and multiplies a negative one, of every token in the prompt or the answer so far
    (Keskar et al. 2019, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the answer holds so far."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the answer holds it so far."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int | None = None
    """Equal seeds give equal tokens, whatever else is in the batch."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end an answer; they are not delivered."""
    end_id: int | None = None
    """One more of them, which `ignore_eos` sets aside."""
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    """Texts that end an answer, wherever tokens are parted in them; the tokens that complete one are delivered."""
    logprobs: int | None = None
    """Report the natural logarithm of each token's probability, and those of this many of the likeliest tokens. They
    are the model's own, before penalties, bias and temperature."""

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": (self.max_tokens >= 1, "must be at least 1"),
            "n": (self.n >= 1, "must be at least 1"),
            "temperature": (self.temperature >= 0, "must not be negative"),
            "top_k": (self.top_k is None or self.top_k >= 1, "must be at least 1"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "must be from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "must be above 0"),
            "stop": (all(self.stop), "must not hold an empty text"),
            "logprobs": (
                self.logprobs is None or 0 <= self.logprobs <= _MOST_TOP_LOGPROBS,
                f"must be from 0 to {_MOST_TOP_LOGPROBS}",
            ),
        }
        for name, (is_right, remedy) in checks.items():
            if not is_right:
                raise ValueError(f"{name}={getattr(self, name)!r} {remedy}")

    def stream(self, index: int = 0) -> random.Random:
        """Of answer `index`."""
        if self.seed is None or index == 0:
            return random.Random(self.seed)
        return random.Random(f"{self.seed}/{index}")

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        if self.end_id is None or self.ignore_eos:
            return self.stop_ids
        return self.stop_ids | {self.end_id}

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        return not (self.temperature or self.changes_logits) and self.logprobs is None

    @property
    def changes_logits(self) -> bool:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)


class Sampled(Protocol):
    """What is known of a row's sequence."""

    sampling: Sampling
    stream: random.Random

    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def answer(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Choice:
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token, natural logarithm of its probability), likeliest first."""


def torch_argmax(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


@torch.inference_mode()
def sample(
    logits: Tensor, rows: Sequence[Sampled], *, argmax: Callable[[Tensor], Tensor] = torch_argmax
) -> list[Choice]:
    """One token per row of `logits` [rows, vocab_size]; may change them in place. `argmax`: of each row."""
    reported = _logprobs(logits, rows)
    for number, row in enumerate(rows):
        if row.sampling.changes_logits:
            _change(logits[number], row)
    chosen = argmax(logits)
    drawn = [number for number, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        # One number per row and step, drawn on the CPU: neither the batch nor the device changes a stream.
        uniform = torch.tensor([rows[number].stream.random() for number in drawn])
        samplings = [rows[number].sampling for number in drawn]
        chosen[drawn] = _draw(logits[drawn].float(), samplings, uniform.to(logits.device))
    return [
        Choice(token) if logprobs is None else _choice(token, logprobs, row.sampling)
        for token, logprobs, row in zip(chosen.tolist(), reported, rows, strict=True)
    ]


def _logprobs(logits: Tensor, rows: Sequence[Sampled]) -> list[Tensor | None]:
    return [
        None if row.sampling.logprobs is None else logits[number].float().log_softmax(dim=-1)
        for number, row in enumerate(rows)
    ]


def _choice(token: int, logprobs: Tensor, sampling: Sampling) -> Choice:
    assert sampling.logprobs is not None
    values, ids = logprobs.topk(min(sampling.logprobs, len(logprobs)))
    return Choice(token, logprobs[token].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _change(logits: Tensor, row: Sampled) -> None:
    """Penalties and bias of one row, `logits` [vocab_size], in place."""
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        ids = torch.tensor(sorted({*row.prompt, *row.answer}), device=logits.device)
        seen, penalty = logits[ids], sampling.repetition_penalty
        logits[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and row.answer:
        ids, counts = torch.tensor(row.answer, device=logits.device).unique(return_counts=True)
        logits[ids] -= (sampling.presence_penalty + sampling.frequency_penalty * counts).to(logits.dtype)
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[ids] += logits.new_tensor(list(sampling.logit_bias.values()))


def _draw(logits: Tensor, samplings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """A token for each row of `logits` [rows, vocab_size], where `uniform` [rows] of the kept mass lies below it."""
    temperature = logits.new_tensor([s.temperature for s in samplings]).clamp_min(1e-6)
    # The largest logit goes to zero before the division, so that a tiny temperature cannot overflow.
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature.unsqueeze(1)).exp()
    chosen = torch.empty(len(samplings), dtype=torch.long, device=logits.device)
    ordered = [number for number, s in enumerate(samplings) if s.top_k is not None or s.top_p < 1]
    plain = [number for number in range(len(samplings)) if number not in set(ordered)]
    if plain:
        kept = _at_least(weights[plain], [samplings[number].min_p for number in plain])
        chosen[plain] = _at(kept, uniform[plain])
    if ordered:
        chosen[ordered] = _draw_ordered(weights[ordered], [samplings[n] for n in ordered], uniform[ordered])
    return chosen


def _draw_ordered(weights: Tensor, samplings: Sequence[Sampling], uniform: Tensor, *, is_whole: bool = False) -> Tensor:
    """The same for rows of `weights` [rows, vocab_size] of which only the likeliest tokens can be drawn.

    Sums are in double precision, so that no row's depend on how many others are beside it. `is_whole`: all tokens are
    ordered, not as many as will nearly always do.
    """
    vocab_size = weights.shape[1]
    counts = [min(s.top_k or (vocab_size if is_whole else _CANDIDATES), vocab_size) for s in samplings]
    kept, ids = _likeliest(weights, max(counts))
    count = torch.tensor(counts, device=weights.device).unsqueeze(1)
    kept = torch.where(torch.arange(kept.shape[1], device=weights.device) < count, kept, 0.0)
    has_top_k = torch.tensor([s.top_k is not None for s in samplings], device=weights.device)
    held = kept.sum(dim=-1, dtype=torch.float64)
    mass = torch.where(has_top_k, held, weights.sum(dim=-1, dtype=torch.float64))
    nucleus = mass * torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=weights.device)
    # A token is kept while those before it hold less than top_p; the likeliest always is.
    before = kept.cumsum(dim=-1, dtype=torch.float64) - kept
    least = kept[:, :1] * kept.new_tensor([s.min_p for s in samplings]).unsqueeze(1)
    can_be_drawn = (before < nucleus.unsqueeze(1)) & (kept >= least)
    chosen = ids.gather(1, _at(torch.where(can_be_drawn, kept, 0.0), uniform).unsqueeze(1)).squeeze(1)
    short = [] if is_whole else (held < nucleus).nonzero().flatten().tolist()  # those candidates were too few
    if short:
        chosen[short] = _draw_ordered(weights[short], [samplings[n] for n in short], uniform[short], is_whole=True)
    return chosen


def _likeliest(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of `weights` [rows, vocab_size], fp32 and not negative, and their ids; of equals,
    which are many in bf16, the first come first: `topk` alone chooses among them by how many are asked for."""
    last = weights.shape[1] - 1
    # The bits of such numbers are ordered as the numbers are.
    keys = weights.contiguous().view(torch.int32).long() << 32 | last - torch.arange(last + 1, device=weights.device)
    ids = last - (keys.topk(count)[0] & 0xFFFFFFFF)
    return weights.gather(1, ids), ids


def _at_least(weights: Tensor, shares: Sequence[float]) -> Tensor:
    """`weights` [rows, vocab_size], whose largest is 1, without those below each row's share of it."""
    return torch.where(weights >= weights.new_tensor(shares).unsqueeze(1), weights, 0.0)


def _at(weights: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution of `weights` [rows, tokens] at `uniform` [rows], in double precision."""
    cumulative = weights.double().cumsum(dim=-1)
    place = torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1]).unsqueeze(1), right=True).squeeze(1)
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(dim=-1)  # that can be drawn
    return torch.minimum(place, last)
