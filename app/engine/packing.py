"""Linear layers in the form in which the engine multiplies with them fastest on a CPU.

torch's fp32 products go through MKL, which on AMD's processors is slow for few rows. On two cores of an EPYC with AVX2:
[64, 768] x [768, 3072] at 60 GFLOP/s there and at 111 with weights that oneDNN has laid out, [8, 768] x [768, 50257] at
16 and 45. The packed weights are a second copy: the plain ones stay, for the deltas to be built on.

Where the processor has AMX, or AVX-512 with BF16 or VNNI, bf16, int8 and NF4 go through products of our own
(`kernels/products.c`), which ask for weights ahead and multiply no more rows than there are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.engine.kernels import Before, Kernels
from app.engine.kernels.blocks import Product
from app.engine.kernels.products import PackedBytes, PackedNf4Weights, PackedWeights, Products, products
from app.models.decoder import Decoder
from app.models.quantization.int8 import Int8Dynamic
from app.models.quantization.integer_product import OneDnnProduct
from app.models.quantization.nf4 import BLOCK, Nf4Linear

_ROWS = 64
"""oneDNN lays weights out for a number of rows; other numbers of them then go as well."""


def round_up(num_rows: int) -> int:
    """As many rows as the step computes for `num_rows` of them.

    oneDNN compiles a product for each number of rows, in a millisecond or more, and keeps up to a thousand of them, of
    half a megabyte each; so it is shown few.
    """
    if num_rows == 1:
        return 1  # which has kernels of its own
    multiple = 8 if num_rows <= 64 else 32 if num_rows <= 256 else 64
    return -(-num_rows // multiple) * multiple


class PackedLinear(nn.Module):
    """Computes what `linear` does, for [1, rows, in] or [rows, in].

    In fp32 a single row is multiplied with the plain weights, which are read faster than those that oneDNN lays out.
    """

    def __init__(self, linear: nn.Linear, kernels: Kernels | None) -> None:
        super().__init__()
        self.bias = linear.bias
        self.weight = linear.weight
        self._kernels = kernels
        ours = products()
        self.products = ours if ours and ours.of_bf16 and linear.weight.dtype == torch.bfloat16 else None
        """None: oneDNN's are taken."""
        if self.products is not None:
            self._ours = PackedWeights(linear.weight, linear.bias)
        else:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def described(self, before: Before) -> Product | None:
        """For `CompiledBlocks`."""
        if self.products is not None:
            return Product.of_bf16(before, self.weight, self._ours)
        return Product.of_row(before, self.weight, self.bias) if self.weight.dtype == torch.float32 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.products is not None:
            y = self.products.multiply(x.reshape(-1, x.shape[-1]), self._ours)
            return y.view(*x.shape[:-1], y.shape[-1])
        if self._kernels is not None and x.numel() == x.shape[-1] and x.dtype == torch.float32:
            return self._kernels.multiply_row(x.contiguous(), self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


class PackedInt8(nn.Module):
    """Computes what `layer` does, for [..., in], with the rounding of activations and the scaling of products in one
    pass each."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: Int8Dynamic, kernels: Kernels) -> None:
        super().__init__()
        for name in ("codes", "scale", "bias"):  # as buffers: by them a LoRA is known to be over this layer
            self.register_buffer(name, getattr(layer, name), persistent=False)
        self._kernels = kernels
        self.products = _products_of_bytes()
        """None: oneDNN's are taken."""
        if self.products is not None:  # its sums of 8 bits times 8 bits are exact
            self.levels = 127
            self._ours = PackedBytes(layer.codes, layer.scale, layer.bias, zero=128)
        else:
            product = layer.product
            assert isinstance(product, OneDnnProduct)
            self._product, self.levels = product, product.levels

    def described(self, before: Before) -> Product | None:
        """For `CompiledBlocks`."""
        return None if self.products is None else Product.of_bytes(before, self.codes, self._ours, levels=self.levels)

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        if type(layer) is not Int8Dynamic:
            return False
        return _products_of_bytes() is not None or isinstance(layer.product, OneDnnProduct)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self.of_rounded(*self._kernels.round_rows(rows, self.levels), x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def of_rounded(self, integers: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
        """[rows, out] in `dtype`, of rows as `Kernels.round_rows` rounds them to `levels`."""
        if self.products is not None:
            return self.products.multiply_bytes(integers, steps, self._ours, dtype)
        return self._kernels.scale_rows(self._product.of_integers(integers), steps, self.bias, dtype)


class PackedNf4(nn.Module):
    """Computes what `layer` does, for [..., in], in products of bf16: activations are rounded to it, and the 16 values;
    the blocks' maxima to fp16, as shares of their row's largest."""

    _INPUTS = 32
    """That have one maximum: half a block, as a block of a width like 288 begins in the middle of a row."""

    def __init__(self, layer: Nf4Linear) -> None:
        super().__init__()
        for name, buffer in layer.named_buffers():  # by which a LoRA is known to be over this layer
            self.register_buffer(name, buffer, persistent=False)
        ours = products()
        assert ours is not None
        self.products = ours
        self._shape = layer.out_features, layer.in_features
        absmax = layer.absmax().repeat_interleave(BLOCK // self._INPUTS)
        count = layer.out_features * layer.in_features // self._INPUTS
        self._ours = PackedNf4Weights(layer.indices(), absmax[:count].view(layer.out_features, -1), layer.bias)

    @classmethod
    def suits(cls, layer: nn.Module) -> bool:
        if not isinstance(layer, Nf4Linear) or layer.codes.device.type != "cpu" or layer.in_features % cls._INPUTS:
            return False
        ours = products()
        return ours is not None and ours.of_bf16

    def described(self, before: Before) -> Product | None:
        """For `CompiledBlocks`."""
        return Product.of_nf4(before, self._shape, self._ours)

    def forward(self, x: Tensor) -> Tensor:
        y = self.products.multiply_nf4(x.reshape(-1, x.shape[-1]), self._ours)
        return y.view(*x.shape[:-1], y.shape[-1])


def _products_of_bytes() -> Products | None:
    ours = products()
    return ours if ours is not None and ours.of_bytes else None


def pack(layer: nn.Module, kernels: Kernels | None, *, is_packed: bool) -> nn.Module:
    """`layer`, or its faster form if there is one; `is_packed` as `can_pack` says of the model."""
    if is_packed and isinstance(layer, nn.Linear):
        return PackedLinear(layer, kernels)
    if kernels is not None and PackedInt8.suits(layer):
        return PackedInt8(layer, kernels)  # type: ignore[arg-type]
    if kernels is not None and PackedNf4.suits(layer):
        return PackedNf4(layer)  # type: ignore[arg-type]
    return layer


def has_onednns(*modules: nn.Module) -> bool:
    """Whether any layer's product is one that oneDNN compiles for each number of rows."""
    layers = (layer for module in modules for layer in module.modules())
    return any(isinstance(layer, PackedLinear | PackedInt8) and layer.products is None for layer in layers)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed products are there, and faster than plain ones."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float32


class AlignedHead(nn.Linear):
    """Logits on a GPU for a vocabulary that is no multiple of 8, as GPT-2's 50,257: rows of logits that begin at any
    address take a product five times as long. So there are weights of zero behind, whose logits are cut off."""

    def __init__(self, weight: Tensor) -> None:
        vocab_size, width = weight.shape
        super().__init__(width, vocab_size, bias=False, device="meta")
        self._padded = F.pad(weight, (0, 0, 0, -vocab_size % 64))
        self.weight = nn.Parameter(self._padded[:vocab_size], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._padded)[..., : self.out_features]


def packed_head(model: Decoder, kernels: Kernels | None, *, is_int8: bool, is_packed: bool) -> nn.Module:
    """The token embedding as the layer that makes logits; in int8 at choice, which rounds them."""
    weight = model.token_embedding.weight
    if is_int8:
        head = Int8Dynamic(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        head.store(weight.detach().float())
        return pack(head, kernels, is_packed=is_packed)
    if weight.device.type == "cuda" and weight.dtype.itemsize == 2 and weight.shape[0] % 8:
        return AlignedHead(weight.detach())
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return pack(linear, kernels, is_packed=is_packed)
