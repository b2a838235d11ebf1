"""Linear layers with 4-bit NormalFloat weights and double quantization: QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

Each 64 weights, in the order of memory, share their absolute maximum; what is left of each is the nearest of 16 values,
quantiles of a normal distribution. The maxima, less their mean, are quantized in turn: to 8-bit floats, blocks of 256
sharing an absolute maximum. That makes 4.127 bits a weight. Values, 8-bit floats and the order of the two codes in a
byte are those of bitsandbytes. Own code, because torchao 0.18's takes only layers whose number of weights is a
multiple of 64 · 256, which 288 · 864 is not.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.quantization.layer import QuantizedLinear

BLOCK = 64
OUTER_BLOCK = 256

VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Nf4Linear(QuantizedLinear):
    """`codes` uint8 [blocks · 32], the first weight of each pair in the higher four bits, and for the blocks' absolute
    maxima `absmax_codes` uint8 [blocks], `absmax_scale` fp32 [outer blocks], `absmax_mean` fp32 [].

    The last block is filled up with zeros.
    """

    scheme = "nf4"
    codes: Tensor
    absmax_codes: Tensor
    absmax_scale: Tensor
    absmax_mean: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool, device: Any = None) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device)
        blocks = -(-in_features * out_features // BLOCK)
        outer_blocks = -(-blocks // OUTER_BLOCK)
        self.register_buffer("codes", torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=device))
        self.register_buffer("absmax_codes", torch.empty(blocks, dtype=torch.uint8, device=device))
        self.register_buffer("absmax_scale", torch.empty(outer_blocks, device=device))
        self.register_buffer("absmax_mean", torch.empty((), device=device))

    def store(self, weight: Tensor) -> None:
        blocks = _blocks(weight.flatten(), BLOCK)
        absmax = blocks.abs().amax(dim=1)
        high, low = _nearest(_divided(blocks, absmax), torch.tensor(VALUES, device=weight.device)).view(-1, 2).T
        self.codes = high << 4 | low
        self.absmax_mean = absmax.mean()
        centred = _blocks(absmax - self.absmax_mean, OUTER_BLOCK)
        self.absmax_scale = centred.abs().amax(dim=1)
        codes = _nearest(_divided(centred, self.absmax_scale), dynamic_floats(weight.device))
        self.absmax_codes = codes.flatten()[: len(absmax)].contiguous()

    def dequantized_weight(self) -> Tensor:
        # A byte looks up both of its weights at once, as one element of 64 bits: half the time of pairs.
        weights = _pairs(self.codes.device).index_select(0, self.codes.int()).view(torch.float32)
        weights = weights.view(-1, BLOCK).mul_(self.absmax().unsqueeze(1)).view(-1)
        return weights[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def multiply(self, rows: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        return F.linear(rows, self.dequantized_weight().to(rows.dtype), bias)

    def indices(self) -> Tensor:
        """uint8 [out, in], of each weight the place in `VALUES`."""
        indices = torch.stack([self.codes >> 4, self.codes & 15], dim=1).flatten()
        return indices[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def absmax(self) -> Tensor:
        """[blocks] in fp32."""
        values = dynamic_floats(self.codes.device)[self.absmax_codes.int()]
        scale = self.absmax_scale.repeat_interleave(OUTER_BLOCK)[: len(values)]
        return torch.addcmul(self.absmax_mean, values, scale)


@functools.cache
def dynamic_floats(device: torch.device) -> Tensor:
    """[256] rising: 8-bit floats whose exponent takes as many bits as it needs (Dettmers 2015, arXiv:1511.04561)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), device=device)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """[256]: for each byte the bits of its two values."""
    values = torch.tensor(VALUES, device="cpu")
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)  # [256, 2]
    return pairs.view(torch.int64).flatten().to(device)


def _blocks(values: Tensor, size: int) -> Tensor:
    """`values` [n] as [blocks, size], zeros at the end."""
    return F.pad(values, (0, -len(values) % size)).view(-1, size)


def _divided(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Blocks within ±1; one of zeros stays so."""
    return blocks / torch.where(absmax > 0, absmax, 1).unsqueeze(1)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """uint8, the places in `table`, which rises, of the entries nearest to `values`."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2).to(torch.uint8)
