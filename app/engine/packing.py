"""Linear layers whose weights oneDNN has laid out for its own products.

torch's fp32 products go through MKL, which on AMD's processors is slow for few rows. On two cores of an EPYC with AVX2:
[64, 768] x [768, 3072] at 60 GFLOP/s there and at 111 with packed weights, [8, 768] x [768, 50257] at 16 and 45.
The packed weights are a second copy: the plain ones stay, for the deltas to be built on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.engine.kernels import Kernels
from app.models.decoder import Decoder
from app.models.quantization.int8 import Int8Dynamic

_ROWS = 64
"""oneDNN lays weights out for a number of rows; other numbers of them then go as well."""
_FEW = 8
"""Rows are rounded up to a multiple, of this one up to `_ROWS`, of `_ROWS` beyond: oneDNN compiles a product for each
number of rows, and keeps up to a thousand of them, of half a megabyte each."""


class PackedLinear(nn.Module):
    """Computes what `linear` does, for [batch, rows, in] or [rows, in].

    A single row is multiplied with the plain weights, which are read faster.
    """

    def __init__(self, linear: nn.Linear, kernels: Kernels | None) -> None:
        super().__init__()
        self.bias = linear.bias
        self.weight = linear.weight
        self._kernels = kernels if linear.weight.dtype == torch.float32 else None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        if self._kernels is not None and x.numel() == x.shape[-1]:
            return self._kernels.multiply_row(x.contiguous(), self.weight, self.bias)
        num_rows = x.shape[-2]
        missing = -num_rows % (_FEW if num_rows <= _ROWS else _ROWS)
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")[..., :num_rows, :]


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed products are there, and faster than plain ones."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float32


def packed_head(model: Decoder, kernels: Kernels | None, *, is_int8: bool, is_packed: bool) -> nn.Module:
    """The token embedding as the layer that makes logits; in int8 at choice, which rounds them."""
    weight = model.token_embedding.weight
    if is_int8:
        head = Int8Dynamic(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        head.store(weight.detach().float())
        return head
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return PackedLinear(linear, kernels) if is_packed else linear
