"""GELU in its approximation by tanh, which is GPT-2's (Hendrycks and Gimpel 2016, arXiv:1606.08415).

torch defines it. On a CPU our kernel computes it, several times as fast; within `torch.compile` torch does, which fuses
it with its neighbours.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from app.models.kernels.cpu import Kernels, kernels_for


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), nearly, of any shape; differentiable once where our kernel computes it."""
    kernels = kernels_for(x)
    if kernels is None:
        return F.gelu(x, approximate="tanh")
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Gelu.apply(x, kernels))
    return kernels.gelu(x.contiguous())


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.kernels = kernels
        return kernels.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.kernels.gelu_backward(x, grad_output.contiguous()), None
