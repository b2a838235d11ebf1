"""Linear layers with int8 weights, symmetric, one scale an output channel.

`Int8Dynamic` and `Int8Static` multiply integers; static ranges are made even over input channels first, as in
SmoothQuant (Xiao et al. 2022, arXiv:2211.10438). `Int8Weight` multiplies floats. Own code, because torchao 0.18 has on
CPU torch._int_mm alone, which without VNNI makes a layer 7 to 29 times slower than in fp32, and passes no gradient to
the input there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.quantization.integer_product import Product, kernel_for
from app.models.quantization.layer import QuantizedLinear

_SMALLEST = 1e-12
"""Below this an absolute maximum counts as zero, by which nothing can be divided."""
_SMOOTHING = 0.75
"""α of SmoothQuant: how much of the activations' unevenness moves into the weights. The authors take 0.5 to 0.75;
on the embedded model 0.75 costs the less perplexity, in 7 bits."""
_FEW_ROWS = 32
"""Up to here reading the weight costs more than multiplying by it."""


class Int8Linear(QuantizedLinear):
    """`codes` int8 [out, in] and `scale` fp32 [out]: W ≈ codes · scale."""

    codes: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool, device: Any = None) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device)
        self.register_buffer("codes", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, device=device))

    def store(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(dim=1).clamp_min(_SMALLEST) / 127
        self.codes = (weight / self.scale.unsqueeze(1)).round().to(torch.int8)

    def dequantized_weight(self) -> Tensor:
        return self.codes * self.scale.unsqueeze(1)


class Int8Weight(Int8Linear):
    """Multiplies in the activations' float format."""

    scheme = "int8_weight"

    def multiply(self, rows: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        if self._suits_int8pack(rows):
            y = torch._weight_int8pack_mm(rows, self.codes, self.scale.to(rows.dtype))
            return y if bias is None else y + bias
        return F.linear(rows, self.dequantized_weight().to(rows.dtype), bias)

    def _suits_int8pack(self, rows: Tensor) -> bool:
        """Whether torch's kernel that converts the weight in registers is the faster one: for few rows in bf16.

        In fp32 it is not vectorized; and it reads beyond the weight (and crashes) where a row is not whole vectors.
        """
        is_fast = rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and len(rows) <= _FEW_ROWS
        return is_fast and self.in_features % 32 == 0


class IntegerLinear(Int8Linear):
    """Multiplies integers, by a product that is packed at first use for the device."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, device: Any = None) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device)
        self._product: Product | None = None

    def pack(self) -> Product:
        """The product for the buffers' values and device as they are."""
        raise NotImplementedError

    @property
    def product(self) -> Product:
        if self._product is None:
            self._product = self.pack()
        return self._product

    @product.setter
    def product(self, product: Product | None) -> None:
        """None: to be packed at next use."""
        self._product = product

    @property
    def levels(self) -> int:
        """Activations become integers from -levels to levels: 127, or 63 where the processor lacks VNNI."""
        return kernel_for(self.codes.device).levels

    def store(self, weight: Tensor) -> None:
        super().store(weight)
        self._product = None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._product = None  # packed for a device
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._product = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_product": None}  # for copies and other processes, which pack their own


class Int8Dynamic(IntegerLinear):
    """Every token's activations are divided by their own largest one."""

    scheme = "int8_dynamic"

    def pack(self) -> Product:
        # The bias comes after the tokens' scales.
        return kernel_for(self.codes.device).pack(self.codes, self.scale, None)

    def multiply(self, rows: Tensor) -> Tensor:
        values = rows.float()
        step = values.abs().amax(dim=1, keepdim=True).clamp_min_(_SMALLEST).div_(self.levels)  # [rows, 1]
        y = self.product(values / step)
        y = y.mul_(step) if self.bias is None else torch.addcmul(self.bias, y, step)
        return y.to(rows.dtype)


class Int8Static(IntegerLinear):
    """Activations are divided by `smoothing` fp32 [in], then cut off at ±`input_range` fp32 []; both from calibration.

    The weight is stored with the smoothing in it: W x = (W diag s)(diag s⁻¹ x).
    """

    scheme = "int8_static"
    smoothing: Tensor
    input_range: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool, device: Any = None) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device)
        self.register_buffer("smoothing", torch.empty(in_features, device=device))
        self.register_buffer("input_range", torch.empty((), device=device))

    def store_calibrated(self, weight: Tensor, largest: Tensor) -> None:
        """As `store`, for inputs whose largest absolute values on each channel are `largest` [in]."""
        largest = largest.clamp_min(1e-5)
        # SmoothQuant's equation 4
        self.smoothing = largest**_SMOOTHING / weight.abs().amax(dim=0).clamp_min(1e-5) ** (1 - _SMOOTHING)
        self.input_range = (largest / self.smoothing).amax()
        self.store(weight * self.smoothing)

    def dequantized_weight(self) -> Tensor:
        return super().dequantized_weight() / self.smoothing

    def pack(self) -> Product:
        levels = self.levels
        step = self.input_range / levels
        divisor = self.smoothing * step
        product = kernel_for(self.codes.device).pack(self.codes, self.scale * step, self.bias)
        return lambda rows: product((rows / divisor).clamp_(-levels, levels))

    def multiply(self, rows: Tensor) -> Tensor:
        return self.product(rows.float()).to(rows.dtype)
