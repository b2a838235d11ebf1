"""The decoder: GPT-2 (Radford et al. 2019), written to be read.

It trains and it serves. It knows tensors only: no text, no files, no techniques. `forward` returns hidden states;
`head` turns the rows that are needed into logits, because most rows of a training batch or a prompt need none.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    width: int
    mlp_width: int
    norm_epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


class Cache(Protocol):
    """Where attention keeps the keys and values of earlier tokens while generating."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, and mix for each query the values that it may see, old and new.

        All are [batch, heads, time, head_width]. How rows belong to sequences is the cache's own affair: an engine
        lays the tokens of many sequences end to end in one row.
        """
        ...


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, 3, self.num_heads, width // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, head_width]
        if cache is None:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        else:
            mixed = cache.attend(self.layer, q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    """GPT-2's feed-forward layer, with the tanh approximation of GELU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.attn = Attention(config, layer)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), mask=mask, cache=cache)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states [batch, time, width] of `ids` [batch, time].

        `positions` [batch, time] default to 0, 1, 2, …. Without a cache attention is causal over the row, so
        padding belongs on the right; with `documents` [batch, time] it is so within each document of the row, which
        then sees nothing of its neighbours. With a cache, the cache decides what each token sees.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.token_embedding(ids) + self.position_embedding(positions)
        mask = None if documents is None else _isolating_mask(documents)
        for block in self.blocks:
            x = block(x, mask=mask, cache=cache)
        return self.final_norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of `hidden` [..., width]; the weights are the token embedding's (tied)."""
        return F.linear(hidden, self.token_embedding.weight)

    @torch.no_grad()
    def initialize(self, *, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights as GPT-2 does: N(0, 0.02), projections into the residual stream scaled by depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                into_residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
                scale = (2 * self.config.num_layers) ** -0.5 if into_residual else 1.0
                parameter.normal_(0.0, 0.02 * scale, generator=generator)


def _isolating_mask(documents: Tensor) -> Tensor:
    """bool [batch, 1, time, time]: whether a query (third axis) may see a key (fourth): of its document, not later."""
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)
