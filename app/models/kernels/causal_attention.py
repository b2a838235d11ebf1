"""Causal attention in bf16 on a CPU: torch's flash kernel forward, matrix products of whole documents backward.

Torch's own backward pass goes by small blocks, which leaves most of a processor's matrix units idle: on one with AMX it
takes three times as long as the products below, which hold a document's score matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 1024
"""Of a document, in tokens: beyond, the score matrix [heads, time, time] costs more than it gains."""
MERGED = 192
"""Tokens up to which neighbours are multiplied as one, what lies between them masked: a product of its own for each
short document costs more."""
ROUND_TO = 32
"""Rows of the products: oneDNN compiles them for each shape, and keeps what it compiled."""


@dataclass(frozen=True)
class Span:
    """Whole documents that lie end to end."""

    lengths: tuple[int, ...]
    start: int
    mask: Tensor
    """bf16 [rows, rows], `rows` being all their tokens, rounded up: 0 where the first may see the second, else -inf."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def spans_of(lengths: Sequence[int]) -> tuple[Span, ...] | None:
    """Of documents of `lengths` end to end; None where one is too long for it."""
    if max(lengths) > LONGEST:
        return None
    groups: list[list[int]] = []
    for length in lengths:
        if groups and sum(groups[-1]) + length <= MERGED:
            groups[-1].append(length)
        else:
            groups.append([length])
    spans, start = [], 0
    for group in groups:
        spans.append(Span(tuple(group), start, _mask(group)))
        start += sum(group)
    return tuple(spans)


def _mask(lengths: Sequence[int]) -> Tensor:
    # The rows that fill up are a document of their own: each sees itself, so that no row sees nothing.
    parts = [*lengths, -sum(lengths) % ROUND_TO]
    documents = torch.tensor([number for number, length in enumerate(parts) for _ in range(length)])
    is_seen = (documents.unsqueeze(1) == documents).tril_()
    return torch.zeros(is_seen.shape, dtype=torch.bfloat16).masked_fill_(~is_seen, float("-inf"))


def is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether `causal_attention` of such queries and keys beats torch's own, if their documents are short enough."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.shape == k.shape
        and q.requires_grad
        and torch.is_grad_enabled()
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """For each query the mix of the values of its own document that are not later.

    All are [batch, heads, time, head_width]; `spans` are of all batch · time tokens, row after row. It is
    differentiable once. The gradient is that of scores and weights rounded to bf16.
    """
    return cast(Tensor, _CausalAttention.apply(q, k, v, spans))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: tuple[Span, ...]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.spans = spans
        parts = [_end_to_end(tensor) for tensor in (q, k, v)]
        mixed = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        for span in spans:
            start = span.start
            for length in span.lengths:
                q1, k1, v1 = (part[start : start + length].transpose(0, 1).unsqueeze(0) for part in parts)
                result = F.scaled_dot_product_attention(q1, k1, v1, is_causal=True)
                mixed[start : start + length] = result.squeeze(0).transpose(0, 1)
                start += length
        return _in_rows(mixed, q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        parts = [_end_to_end(tensor) for tensor in (*ctx.saved_tensors, grad_output)]
        gradients = [torch.empty_like(parts[0], memory_format=torch.contiguous_format) for _ in range(3)]
        for span in ctx.spans:
            place = slice(span.start, span.start + span.num_tokens)
            filled = (_filled_up(part[place], len(span.mask)) for part in parts)
            of_span = _gradients(*filled, mask=span.mask)
            for gradient, result in zip(gradients, of_span, strict=True):
                gradient[place] = result[:, : span.num_tokens].transpose(0, 1)
        return (*(_in_rows(gradient, ctx.saved_tensors[0]) for gradient in gradients), None)


def _gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `q`, `k` and `v`, where `grad` is that of what they make; all [heads, rows, head_width]."""
    scale = q.shape[2] ** -0.5
    weights = torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(-1)  # [heads, rows, rows], as the next
    grad_scores = torch._softmax_backward_data(grad @ v.mT, weights, -1, weights.dtype)
    return (grad_scores @ k).mul_(scale), (grad_scores.mT @ q).mul_(scale), weights.mT @ grad


def _end_to_end(tensor: Tensor) -> Tensor:
    """[batch · time, heads, head_width] of [batch, heads, time, head_width]."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _in_rows(tensor: Tensor, like: Tensor) -> Tensor:
    """The reverse, as `like` is divided into rows."""
    return tensor.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _filled_up(tokens: Tensor, num_rows: int) -> Tensor:
    """[heads, num_rows, head_width] of `tokens` [time, heads, head_width]; zeros fill up."""
    filled = tokens.new_zeros(tokens.shape[1], num_rows, tokens.shape[2])
    filled[:, : len(tokens)] = tokens.transpose(0, 1)
    return filled
