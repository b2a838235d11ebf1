"""`cpu.c` as functions of tensors."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from app.models.kernels.native import DTYPES, is_bf16, load_library


class Kernels:
    def __init__(self, library: ctypes.CDLL) -> None:
        i64, f32, pointer, flag = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
        arguments = {
            "gelu": [pointer, pointer, flag, i64],
            "gelu_backward": [pointer, pointer, pointer, flag, i64],
            "cross_entropy": [pointer, flag, i64, pointer, pointer, i64, i64, f32, flag],
        }
        for name, types in arguments.items():
            getattr(library, name).argtypes, getattr(library, name).restype = types, None
        self._library = library

    def gelu(self, x: Tensor) -> Tensor:
        """GPT-2's, by tanh; of `x`, contiguous."""
        y = torch.empty_like(x)
        self._library.gelu(x.data_ptr(), y.data_ptr(), is_bf16(x), x.numel())
        return y

    def gelu_backward(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """The gradient of `x`, of which that of `gelu(x)` is `grad_y`; both contiguous."""
        grad_x = torch.empty_like(x)
        self._library.gelu_backward(x.data_ptr(), grad_y.data_ptr(), grad_x.data_ptr(), is_bf16(x), x.numel())
        return grad_x

    def cross_entropy(self, logits: Tensor, labels: Tensor, *, smoothing: float, with_gradient: bool) -> Tensor:
        """A `ChunkKernel` of `cross_entropy.py`; rows of `logits` may lie apart."""
        losses = torch.empty(len(logits))
        labels = labels.contiguous()
        self._library.cross_entropy(
            logits.data_ptr(), is_bf16(logits), logits.stride(0), labels.data_ptr(), losses.data_ptr(), *logits.shape,
            smoothing, with_gradient,
        )  # fmt: skip
        return losses.sum()


def kernels_for(x: Tensor) -> Kernels | None:
    """What computes on `x`; None where torch must."""
    is_plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype in DTYPES
    return _kernels() if is_plain and not torch.compiler.is_compiling() else None


@functools.cache
def _kernels() -> Kernels | None:
    library = load_library(Path(__file__).with_name("cpu.c"))
    return None if library is None else Kernels(library)
