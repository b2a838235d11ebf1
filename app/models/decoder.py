"""The decoder: GPT-2 (Radford et al. 2019) and its descendants by configuration, written to be read.

It trains and it serves. It knows tensors only: no text, no files, no techniques. `forward` returns hidden states;
`head` turns the rows that are needed into logits, because most rows of a training batch or a prompt need none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from app.config.base import AttentionBackend
from app.models.attention import KeysValues, RowAttention
from app.models.kernels.clamped_relu import clamped_relu
from app.models.kernels.gelu import gelu

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [..., 1, time, head_width / 2] of the angles by which queries and keys are turned."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes and kinds; the defaults are GPT-2's."""

    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    width: int
    mlp_width: int
    norm_epsilon: float = 1e-5
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    positions: Literal["learned", "rotary"] = "learned"
    activation: Literal["gelu", "swiglu", "clamped_relu"] = "gelu"
    num_kv_heads: int | None = None
    """Heads of keys and values, each shared by a group of query heads (Ainslie et al. 2023); None: one for each."""
    bias: bool = True
    """Whether the linear layers have biases."""
    rotary_base: float = 10_000.0

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


GPT2_SIZES = {
    name: DecoderConfig(50257, 1024, num_layers=layers, num_heads=heads, width=width, mlp_width=4 * width)
    for name, layers, heads, width in (
        ("distilgpt2", 6, 12, 768),
        ("gpt2", 12, 12, 768),
        ("gpt2-medium", 24, 16, 1024),
        ("gpt2-large", 36, 20, 1280),
        ("gpt2-xl", 48, 25, 1600),
    )
}
"""Shapes of the published models, by their names on the Hugging Face hub."""


class Context(Protocol):
    """What the tokens of a forward pass may look at: each other (`RowAttention`), or an engine's KV cache."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """For each query [batch, heads, time, head_width] the mix of the values that it may see, of the same shape.

        `k` and `v` [batch, kv_heads, time, head_width] are those of the same tokens. A cache stores them, and knows
        by itself how rows belong to sequences: an engine lays the tokens of many sequences end to end in one row.
        """
        ...


class Prefix(nn.Module):
    """Keys and values that every sequence sees before its own. Prefix and prompt tuning learn them."""

    length: int

    def forward(self, decoder: "Decoder") -> list[KeysValues]:
        """Of each layer; keys and values are [kv_heads, length, head_width]."""
        raise NotImplementedError


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.num_heads, config.kv_heads, config.kv_heads)  # of queries, keys, values
        self.head_width = config.head_width
        self.qkv = nn.Linear(config.width, sum(self.heads) * config.head_width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor, context: Context, rotation: Rotation | None) -> Tensor:
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, -1, self.head_width).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)  # each [batch, heads, time, head_width]
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = context.attend(self.layer, q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    """The feed-forward layer. SwiGLU's gate and value (Shazeer 2020, arXiv:2002.05202) come from one matrix, `up`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        num_inputs = 2 if config.activation == "swiglu" else 1
        self.up = nn.Linear(config.width, num_inputs * config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = new_norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = new_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context, rotation: Rotation | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), context, rotation)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """`attention` names the kernel of attention without a cache; `prefix`, if set, precedes every sequence;
    `checkpoint_blocks` keeps each block's input alone for the backward pass, which computes the rest again."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.attention: AttentionBackend = "auto"
        self.checkpoint_blocks = False
        self.prefix: Prefix | None = None
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = new_norm(config)

    @property
    def max_length(self) -> int:
        """The longest sequence: what the context holds beside the prefix."""
        return self.config.context_length - self.prefix_length

    @property
    def prefix_length(self) -> int:
        return self.prefix.length if self.prefix is not None else 0

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        document_lengths: Sequence[int] | None = None,
        cache: Context | None = None,
        then: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [batch, time, width] of `ids` [batch, time]; with `then`, what it makes of them.

        Where ZeRO-3 has partitioned the weights, the head's can be read within this call alone, so by `then`.

        `positions` [batch, time] default to 0, 1, 2, …; a prefix shifts them. Without a cache attention is causal
        over the row, so padding belongs on the right; with `documents` [batch, time] it is so within each document
        of the row, which then sees nothing of its neighbours (`document_lengths` spares reading theirs from there).
        With a cache, the cache decides what each token sees, and holds the prefix already.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        if cache is None:
            prefix = None if self.prefix is None else self.prefix(self)
            cache = RowAttention(documents, prefix=prefix, backend=self.attention, lengths=document_lengths)
        hidden = self.final_norm(self.run_blocks(self.token_embedding(ids), positions + self.prefix_length, cache))
        return then(hidden) if then is not None else hidden

    def run_blocks(self, x: Tensor, positions: Tensor, context: Context) -> Tensor:
        """`x` [batch, time, width], token embeddings, through all blocks."""
        rotation = None
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions)
        else:
            rotation = rotation_of(positions, self.config)
        for block in self.blocks:
            if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
                # not reentrant: that form trains nothing where a block's input needs no gradient, below frozen layers
                x = checkpoint(block, x, context, rotation, use_reentrant=False)
            else:
                x = block(x, context, rotation)
        return x

    def compile_blocks(self) -> None:
        """Have `torch.compile` fuse what lies between the matrix products, at the first step and for any length."""
        # Else blocks are compiled one by one, as they differ in `Attention.layer`, and from the ninth on not at all.
        torch._dynamo.config.allow_unspec_int_on_nn_module = True
        for block in self.blocks:
            block.compile(dynamic=True)

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


def new_norm(config: DecoderConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms_norm" else nn.LayerNorm
    return kind(config.width, eps=config.norm_epsilon)


def rotation_of(positions: Tensor, config: DecoderConfig) -> Rotation:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864): pair i turns by position · base^(-2i / width)."""
    pairs = torch.arange(0, config.head_width, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float().unsqueeze(-1) * config.rotary_base ** (-pairs / config.head_width)
    angles = angles.unsqueeze(-3)  # [..., 1, time, head_width / 2]: the same for all heads
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """`x` [batch, heads, time, head_width], its pairs turned. As in Llama, a pair is i and i + head_width / 2."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "swiglu": _swiglu,
    "clamped_relu": clamped_relu,
}
