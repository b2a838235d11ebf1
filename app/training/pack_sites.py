"""Where runs that share a base differ from it: its linear layers, and what each run makes of them for its own rows."""

from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from app.methods.lora import LoraLinear
from app.methods.over_base import updated

_Parts = list[tuple[int, float | None]]
"""Tokens, one member's after another's, and the scale of its update; None where it has none."""


class Site(nn.Module):
    """A layer of the base, and what each member makes of it for its own tokens."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.parts: list[tuple[int, nn.Module | None]] = []
        """Tokens, one member's after another's, and its layer; None: the base's will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not any(layer is not None for _, layer in self.parts):
            return self.base(x)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))  # once, where base and update would each
        x = x[0]
        if self._adds_low_ranks_to(x):
            return _linear_and_low_ranks(x, self.base, self.parts).unsqueeze(0)
        y = self.base(x)  # [time, out]
        counts = [count for count, _ in self.parts]
        # Split and put together by one operation each: slices would each have a gradient as large as the whole.
        own = zip(x.split(counts), y.split(counts), self.parts, strict=True)
        parts = [py if layer is None else updated(layer, self.base, px, py) for px, py, (_, layer) in own]
        return torch.cat(parts).unsqueeze(0)

    def _adds_low_ranks_to(self, x: Tensor) -> bool:
        return (
            isinstance(self.base, nn.Linear)
            and self.base.weight.dtype == x.dtype
            and all(type(layer) in (LoraLinear, NoneType) for _, layer in self.parts)
        )


def _linear_and_low_ranks(x: Tensor, base: nn.Module, parts: Sequence[tuple[int, nn.Module | None]]) -> Tensor:
    """[time, out]: `base` for `x` [time, in], and `LoraLinear.update` for each part's own rows."""
    weights = [weight for _, layer in parts if layer is not None for weight in (layer.lora_a, layer.lora_b)]
    scales = [(count, None if layer is None else layer.scale) for count, layer in parts]
    return cast(Tensor, _LinearAndLowRanks.apply(x, base.weight, base.bias, scales, *weights))


class _LinearAndLowRanks(torch.autograd.Function):
    """All in the place of the base's result and of its gradient: added, split and joined by autograd, they would pass
    over whole activations once more each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: _Parts, *weights: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        lows = []
        for rows, scale, (a, b) in _own_rows(parts, weights):
            lows.append(x[rows] @ a.to(x.dtype).T)  # [time, rank]
            y[rows].addmm_(lows[-1], b.to(x.dtype).T, alpha=scale)
        ctx.parts = parts
        ctx.save_for_backward(x, weight, *weights, *lows)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        weights, lows = saved[: len(saved) // 3 * 2], saved[len(saved) // 3 * 2 :]
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        gradients: list[Tensor | None] = []
        for (rows, scale, (a, b)), low in zip(_own_rows(ctx.parts, weights), lows, strict=True):
            grad = grad_y[rows]
            grad_low = (grad @ b.to(grad.dtype)).mul_(scale)  # [time, rank]
            gradients += [(grad_low.T @ x[rows]).to(a.dtype), (grad.T @ low).mul_(scale).to(b.dtype)]
            if grad_x is not None:
                grad_x[rows].addmm_(grad_low, a.to(grad.dtype))
        return grad_x, None, None, None, *gradients


def _own_rows(parts: _Parts, weights: Sequence[Tensor]) -> Iterator[tuple[slice, float, tuple[Tensor, Tensor]]]:
    """Of those parts that have an update: which rows are theirs, its scale, and A and B."""
    start, pairs = 0, iter(zip(weights[::2], weights[1::2], strict=True))
    for count, scale in parts:
        if scale is not None:
            yield slice(start, start + count), scale, next(pairs)
        start += count
