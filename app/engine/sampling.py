"""From logits to the next token ids. Each request draws from a random stream of its own."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen and when it ends."""

    max_tokens: int
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens can be drawn."""
    top_p: float = 1.0
    """Only the likeliest tokens that together hold this probability can be drawn (Holtzman et al. 2019)."""
    seed: int | None = None
    """Equal seeds give equal tokens, whatever else is in the batch."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the request; they are not delivered."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")

    def stream(self) -> random.Random:
        return random.Random(self.seed)


def sample(logits: Tensor, samplings: Sequence[Sampling], streams: Sequence[random.Random]) -> list[int]:
    """One token id per row of `logits` [rows, vocab_size]."""
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        # One number per row and step, drawn on the CPU: neither the batch nor the device changes a stream.
        uniform = torch.tensor([streams[row].random() for row in drawn])
        chosen[drawn] = _draw(logits[drawn], [samplings[row] for row in drawn], uniform.to(logits.device))
    return chosen.tolist()


def _draw(logits: Tensor, samplings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution, likeliest token first, at `uniform` [rows] of the mass that is kept."""
    vocab_size = logits.shape[-1]
    temperature = logits.new_tensor([s.temperature for s in samplings], dtype=torch.float32)
    top_k = torch.tensor([min(s.top_k or vocab_size, vocab_size) for s in samplings], device=logits.device)
    top_p = torch.tensor([s.top_p for s in samplings], device=logits.device)

    ordered, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    # The largest logit goes to zero before the division, so that a tiny temperature cannot overflow.
    scaled = (ordered - ordered[:, :1]) / temperature.unsqueeze(1).clamp_min(1e-6)
    ranks = torch.arange(vocab_size, device=logits.device)
    scaled = scaled.masked_fill(ranks >= top_k.unsqueeze(1), -torch.inf)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)  # [rows, vocab_size]
    # A token is kept while those before it hold less than top_p; the likeliest always is.
    num_kept = 1 + (cumulative[:, :-1] < top_p.unsqueeze(1)).sum(dim=-1)
    num_kept = torch.minimum(num_kept, top_k)
    kept_mass = cumulative.gather(1, (num_kept - 1).unsqueeze(1)).squeeze(1)
    rank = torch.searchsorted(cumulative, (uniform * kept_mass).unsqueeze(1), right=True).squeeze(1)
    return ids.gather(1, torch.minimum(rank, num_kept - 1).unsqueeze(1)).squeeze(1)
