"""What a decoder computes for one row or a few, on CUDA in Triton: each weight read once, and all else on the way.

Imported where needed: Triton may be missing. A matrix times few rows takes as long as its weights take from memory,
a microsecond for one of GPT-2's, so every kernel beside it counts. Here norms go before the product and bias, GELU
and residual after it, in one kernel.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor, nn

from app.engine.packing import AlignedHead
from app.models.quantization.int8 import Int8Dynamic, Int8Weight

FEW_ROWS = 4
"""Up to here; more are faster in matrix products that read a tile of weights for all of them at once."""
_NORMS = {nn.LayerNorm: 1, nn.RMSNorm: 2}
_SMALLEST = 1e-12
_CHUNK = 4096
"""Logits of which one program finds the largest."""


@triton.jit
def linear_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, bias, norm_weight, norm_bias, residual, y, num_rows, in_features, out_features, epsilon, smallest,
    NORM: tl.constexpr, GELU: tl.constexpr, HAS_SCALE: tl.constexpr, ROUNDS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_OUT outputs of all rows. NORM 1: layer norm, 2: RMS norm of `x` first. ROUNDS: `x` is
    rounded to 8 bits, each row by its largest, and products are of integers, as `Int8Dynamic` says."""
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    ins = tl.arange(0, BLOCK_IN)
    is_out = outs < out_features
    is_in = ins < in_features
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    # Weights are asked for first: they depend on no kernel before this one.
    tile = tl.load(
        weight + outs[:, None].to(tl.int64) * in_features + ins[None, :],
        mask=is_out[:, None] & is_in[None, :],
        other=0,
    )
    if HAS_SCALE:
        scales = tl.load(scale + outs, mask=is_out, other=0.0)
    if HAS_BIAS:
        shift = tl.load(bias + outs, mask=is_out, other=0.0).to(tl.float32)
    if NORM:
        gain = tl.load(norm_weight + ins, mask=is_in, other=0.0).to(tl.float32)
        if HAS_NORM_BIAS:
            centre = tl.load(norm_bias + ins, mask=is_in, other=0.0).to(tl.float32)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    for row in range(num_rows):
        values = tl.load(x + row * in_features + ins, mask=is_in, other=0.0).to(tl.float32)
        if NORM == 1:
            values = tl.where(is_in, values - tl.sum(values, 0) / in_features, 0.0)
        if NORM:
            values = values * tl.rsqrt(tl.sum(values * values, 0) / in_features + epsilon) * gain
            if HAS_NORM_BIAS:
                values += centre
            values = values.to(x.dtype.element_ty).to(tl.float32)
        step = 1.0
        if ROUNDS:
            step = tl.div_rn(tl.maximum(tl.max(tl.abs(values), 0), smallest), 127.0)
            # to the nearest integer, ties to even: of such a sum the last bit is worth 1
            values = (tl.div_rn(values, step) + 12582912.0) - 12582912.0
        products = tl.sum(tile.to(tl.float32) * values[None, :], 1)
        if HAS_SCALE:
            products *= scales
        if ROUNDS:
            products *= step
        if HAS_BIAS:
            products += shift
        if GELU:  # by tanh, as GPT-2's
            inner = 0.7978845608028654 * (products + 0.044715 * products * products * products)
            products *= 1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0)
        if HAS_RESIDUAL:
            products += tl.load(residual + row * out_features + outs, mask=is_out, other=0.0).to(tl.float32)
        tl.store(y + row * out_features + outs, products, mask=is_out)


@triton.jit
def embed_kernel(  # type: ignore[no-untyped-def]
    ids, seen, tokens, positions, y, ids_row, width, HAS_POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program a row: its token's embedding, and that of the last place it sees."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    is_lane = lanes < width
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.load(ids + row * ids_row).to(tl.int64)
    x = tl.load(tokens + token * width + lanes, mask=is_lane, other=0.0)
    if HAS_POSITIONS:
        place = tl.maximum(tl.load(seen + row * ids_row).to(tl.int64) - 1, 0)
        x = (x.to(tl.float32) + tl.load(positions + place * width + lanes, mask=is_lane, other=0.0)).to(x.dtype)
    tl.store(y + row * width + lanes, x, mask=is_lane)


@triton.jit
def largest_of_chunk_kernel(  # type: ignore[no-untyped-def]
    logits, maxima, places, logits_row, vocab_size, num_chunks, CHUNK: tl.constexpr, OVERLAPS: tl.constexpr
):
    """One program a row and chunk of its logits."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    entries = chunk * CHUNK + tl.arange(0, CHUNK)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.load(logits + row * logits_row + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)
    largest, place = tl.max(block, 0, return_indices=True)
    tl.store(maxima + row * num_chunks + chunk, largest)
    tl.store(places + row * num_chunks + chunk, chunk * CHUNK + place)


@triton.jit
def take_largest_kernel(  # type: ignore[no-untyped-def]
    maxima, places, tokens, ids, seen, ids_row, num_chunks, CHUNKS: tl.constexpr, OVERLAPS: tl.constexpr
):
    """One program a row: its token, which becomes the row's next input, one place on. Rows that have seen nothing
    go on seeing nothing."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.load(maxima + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
    _, chunk = tl.max(block, 0, return_indices=True)
    token = tl.load(places + row * num_chunks + chunk)
    length = tl.load(seen + row * ids_row)
    tl.store(tokens + row, token)
    tl.store(ids + row * ids_row, token)
    tl.store(seen + row * ids_row, length + (length > 0).to(tl.int32))


class FewRows:
    """The kernels. `overlaps` as `PagedAttention` says."""

    def __init__(self, *, overlaps: bool = False) -> None:
        self.overlaps = overlaps

    def linear(
        self,
        layer: nn.Module,
        x: Tensor,
        *,
        norm: nn.Module | None = None,
        is_gelu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """[rows, out] = `layer`(`norm`(x)) of `x` [rows, in], through GELU if asked, plus `residual` [rows, out]."""
        is_int8 = isinstance(layer, Int8Weight | Int8Dynamic)
        weight: Tensor = layer.codes if is_int8 else layer.weight  # type: ignore[assignment]
        scale: Tensor = layer.scale if is_int8 else weight  # type: ignore[assignment]
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        out_features, in_features = weight.shape
        y = x.new_empty(len(x), out_features)
        norm_weight = weight if norm is None else norm.weight
        norm_bias = None if norm is None else getattr(norm, "bias", None)
        block_out, block_in, num_warps = tile_of(out_features, in_features)
        assert x.is_contiguous() and weight.is_contiguous() and (residual is None or residual.is_contiguous())
        with torch.cuda.device_of(x):
            linear_kernel[(triton.cdiv(out_features, block_out),)](
                x, weight, scale, weight if bias is None else bias, norm_weight,
                weight if norm_bias is None else norm_bias, x if residual is None else residual, y,
                len(x), in_features, out_features, 0.0 if norm is None else _epsilon(norm, x.dtype), _SMALLEST,
                0 if norm is None else _NORMS[type(norm)], is_gelu, is_int8, isinstance(layer, Int8Dynamic),
                bias is not None, norm_bias is not None, residual is not None, block_out, block_in, self.overlaps,
                num_warps=num_warps, **self._options,
            )  # fmt: skip
        return y

    def embed(self, ids: Tensor, seen: Tensor, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """[rows, width]: of `tokens` [vocab_size, width] those in `ids`, plus of `positions` [places, width] the last
        that a row has `seen`; both int32 [rows], of one stride."""
        y = tokens.new_empty(len(ids), tokens.shape[1])
        with torch.cuda.device_of(tokens):
            embed_kernel[(len(ids),)](
                ids, seen, tokens, tokens if positions is None else positions, y, ids.stride(0), tokens.shape[1],
                positions is not None, triton.next_power_of_2(tokens.shape[1]), self.overlaps, **self._options,
            )  # fmt: skip
        return y

    def take_largest(self, logits: Tensor, tokens: Tensor, ids: Tensor, seen: Tensor) -> None:
        """The place of the largest of each row of `logits` [rows, vocab_size], the first of equals, into `tokens` and
        `ids`; `seen` grows by one where it is not 0. All int32 [rows], the last two of one stride."""
        rows, vocab_size = logits.shape
        num_chunks = triton.cdiv(vocab_size, _CHUNK)
        maxima = torch.empty(rows, num_chunks, dtype=torch.float32, device=logits.device)
        places = torch.empty(rows, num_chunks, dtype=torch.int32, device=logits.device)
        with torch.cuda.device_of(logits):
            largest_of_chunk_kernel[(rows, num_chunks)](
                logits, maxima, places, logits.stride(0), vocab_size, num_chunks, _CHUNK, self.overlaps, num_warps=8,
                **self._options,
            )  # fmt: skip
            take_largest_kernel[(rows,)](
                maxima, places, tokens, ids, seen, ids.stride(0), num_chunks, triton.next_power_of_2(num_chunks),
                self.overlaps, num_warps=1, **self._options,
            )  # fmt: skip

    @property
    def _options(self) -> dict[str, bool]:
        return {"launch_pdl": True} if self.overlaps else {}


def suits(layer: nn.Module, norm: nn.Module | None = None) -> bool:
    """Whether `linear` computes what they do."""
    if norm is not None and (type(norm) not in _NORMS or norm.weight is None):
        return False
    weight = getattr(layer, "weight", None)
    if type(layer) in (nn.Linear, AlignedHead):
        assert weight is not None
        return weight.dtype in (torch.float32, torch.bfloat16, torch.float16) and weight.is_contiguous()
    return type(layer) in (Int8Weight, Int8Dynamic)


def tile_of(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Outputs and inputs of one program, and its warps: 8,192 weights, or fewer so that programs fill the GPU, but not
    under 1,024."""
    block_in = triton.next_power_of_2(in_features)
    block_out = max(1, 8192 // block_in)
    while block_out > 1 and block_out * block_in > 1024 and triton.cdiv(out_features, block_out) < 192:
        block_out //= 2
    return block_out, block_in, 4 if block_out * block_in <= 8192 else 8


def _epsilon(norm: nn.Module, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if norm.eps is None else norm.eps  # type: ignore[return-value]
