"""Integers times int8 weights, as exact integer sums: which kernel computes them on a device, and its packed form.

Without VNNI, x86 multiplies bytes by `vpmaddubsw`: it adds two products in 16 bits and saturates, so 8 bits times
8 bits come out wrong without a word. 7 bits times 8 do not (2 · 127 · 127 < 2¹⁵). Which case a machine is, is found by
trying the largest sums. Measured on AVX2, [8, 320] · [320, 960]: fp32 0.09 ms, fbgemm 0.05, oneDNN 0.11,
torch._int_mm 0.8; [256, 320]: 1.0, 0.65, 0.6 and 45.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Product = Callable[[Tensor], Tensor]
"""[rows, in] in fp32 within ±levels -> fp32 [rows, out]: round, multiply, scale each output channel, add the bias."""


class Pack(Protocol):
    def __call__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Product:
        """Of `weight` int8 [out, in], `scale` fp32 [out] and `bias` fp32 [out]."""
        ...


@dataclass(frozen=True)
class Kernel:
    levels: int
    """Largest integer, of either sign, that activations may have."""
    pack: Pack


def kernel_for(device: torch.device) -> Kernel:
    """The fastest of the kernels that are exact on `device`."""
    if device.type == "cpu":
        return _cpu_kernel()
    return Kernel(127, pack_int_mm if device.type == "cuda" else pack_float)


@functools.cache
def _cpu_kernel() -> Kernel:
    onednn_8_bit, onednn_7_bit = (Kernel(n, functools.partial(OneDnnProduct, levels=n)) for n in (127, 63))
    # oneDNN first, which uses VNNI and AMX best; in 7 bits fbgemm is the faster one, by half on few rows.
    kernels = (onednn_8_bit, Kernel(63, pack_fbgemm), onednn_7_bit)
    with _disable_current_modes():  # where tensors have no content, all would fail, and that would be kept
        return next(filter(is_exact, kernels), Kernel(127, pack_float))


def is_exact(kernel: Kernel) -> bool:
    """Whether the largest sums come out right, on one row as on many."""
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    try:
        product = kernel.pack(weight, torch.ones(32), None)
        sums = [product(torch.full((rows, 64), float(sign * kernel.levels))) for rows in (1, 64) for sign in (1, -1)]
    except (AttributeError, RuntimeError):  # this build of torch has no such operator
        return False
    return all(bool((result.abs() == 64 * 127 * kernel.levels).all()) for result in sums)


class OneDnnProduct:
    """oneDNN's integers are unsigned: `zero` stands for 0."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, *, levels: int) -> None:
        self.levels, self.zero = levels, levels + 1
        self._scale, self._bias = scale, bias
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._zero_points = torch.zeros(len(scale), dtype=torch.long)

    def __call__(self, values: Tensor) -> Tensor:
        return self.of_integers(values.round().add_(self.zero).to(torch.uint8))

    def of_integers(self, integers: Tensor) -> Tensor:
        """Of what is rounded already, uint8 with `zero` added."""
        return torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, self.zero, self._packed, self._scale, self._zero_points, self._bias, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip


def pack_fbgemm(weight: Tensor, scale: Tensor, bias: Tensor | None) -> Product:
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    zero_points = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():  # tensors of quantized dtypes will go; `is_exact` then finds the next kernel
        warnings.simplefilter("ignore")
        quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero_points, 0)
    packed = torch.ops.quantized.linear_prepack(quantized, bias)
    return lambda values: multiply(values.contiguous(), 1.0, 64, packed)


def pack_int_mm(weight: Tensor, scale: Tensor, bias: Tensor | None) -> Product:
    if weight.shape[1] % 8:  # CUDA's takes no others, nor other numbers of outputs
        return pack_float(weight, scale, bias)
    num_outputs = len(weight)
    filled = F.pad(weight, (0, 0, 0, -num_outputs % 8)) if num_outputs % 8 else weight

    def product(values: Tensor) -> Tensor:
        rows = len(values)
        padding = max(0, 32 - rows)  # it takes no fewer than 17
        integers = F.pad(values.round().to(torch.int8), (0, 0, 0, padding))
        return _scaled(torch._int_mm(integers, filled.t())[:rows, :num_outputs].float(), scale, bias)

    return product


def pack_float(weight: Tensor, scale: Tensor, bias: Tensor | None) -> Product:
    """In fp32, which holds the sums exactly up to 2²⁴: in any case up to 1,040 inputs."""
    return lambda values: _scaled(F.linear(values.round(), weight.float()), scale, bias)


def _scaled(sums: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return sums * scale if bias is None else torch.addcmul(bias, sums, scale)
