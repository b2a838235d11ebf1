"""Causal attention of whole documents on a CPU, and its gradient; see `causal_attention.c`.

torch's own kernel goes by small blocks of a row, and is called for each document of packed rows. With AVX-512 that
takes up to three times as long.
"""

import ctypes
import functools
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from app.models.kernels.native import DTYPES, is_bf16, load_library

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p


class Documents:
    """Lengths of documents that lie end to end through all rows, each within one, as the kernel takes them."""

    def __init__(self, lengths: Sequence[int]) -> None:
        order = sorted(
            range(len(lengths)), key=lambda number: -lengths[number]
        )  # or a long one would be left to the last
        starts = list(accumulate(lengths, initial=0))
        numbers = _i64 * len(lengths)
        self.starts, self.lengths = (numbers(*(of_each[number] for number in order)) for of_each in (starts, lengths))
        self.longest = max(lengths)


def can_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `causal_attention` of such queries, keys and values can be had."""
    return (
        q.device.type == "cpu"
        and all(type(part) in (Tensor, FakeTensor) and part.dtype == q.dtype for part in (q, k, v))
        and q.dtype in DTYPES
        and k.shape == v.shape
        and q.shape[2] == k.shape[2]
        and _library() is not None
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """For each query [batch, heads, time, head_width] the mix of the values of its own document that are not later.

    `k` and `v` [batch, kv_heads, time, head_width], each for a group of query heads. In fp32, whatever is given, but
    for the results. Differentiable once. Fake tensors are given their shapes.
    """
    return cast(Tensor, _CausalAttention.apply(q, k, v, documents))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        q, k, v = (_with_numbers_side_by_side(part) for part in (q, k, v))
        mixed, log_sums = _new(q), q.new_empty(q.shape[1], q.shape[0] * q.shape[2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, log_sums)
        ctx.documents = documents
        _call("attend_forward", q, k, v, log_sums, documents, mixed)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_sums = ctx.saved_tensors
        gradients = [_new(part) for part in (q, k, v)]
        grad_output = _with_numbers_side_by_side(grad_output)
        _call("attend_backward", q, k, v, log_sums, ctx.documents, grad_output, *gradients)
        return (*gradients, None)


class _Place(ctypes.Structure):
    _fields_ = (("at", _pointer), ("batch", _i64), ("head", _i64), ("token", _i64))

    @classmethod
    def of(cls, tensor: Tensor) -> "_Place":
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _Place) for name in ("q", "k", "v")),
        *((name, _i64) for name in ("batch", "time", "heads", "kv_heads", "width", "is_bf16", "num_documents")),
        *((name, _pointer) for name in ("starts", "lengths", "log_sums", "room")),
        ("scale", ctypes.c_double),
    )


def _call(name: str, q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, documents: Documents, *others: Tensor) -> None:
    if isinstance(q, FakeTensor):
        return
    library = _library()
    assert library is not None
    batch, heads, time, width = q.shape
    size = library.bytes_of_attention(documents.longest, width)  # by the thread that calls: it counts its threads
    room = torch.empty(size, dtype=torch.uint8)
    of_documents = ctypes.addressof(documents.starts), ctypes.addressof(documents.lengths)
    attention = _Attention(
        *map(_Place.of, (q, k, v)), batch, time, heads, k.shape[1], width, is_bf16(q), len(documents.lengths),
        *of_documents, log_sums.data_ptr(), room.data_ptr(), width**-0.5,
    )  # fmt: skip
    getattr(library, name)(ctypes.byref(attention), *map(_Place.of, others))


def _new(like: Tensor) -> Tensor:
    """Of the shape [batch, heads, time, width] of `like`; a token's heads lie side by side."""
    batch, heads, time, width = like.shape
    return like.new_empty(batch, time, heads, width).transpose(1, 2)


def _with_numbers_side_by_side(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load_library(Path(__file__).with_name("causal_attention.c"))
    if library is not None:
        library.bytes_of_attention.argtypes, library.bytes_of_attention.restype = [_i64, _i64], _i64
        for name, others in (("attend_forward", 1), ("attend_backward", 4)):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.POINTER(_Attention), *[_Place] * others], None
    return library
