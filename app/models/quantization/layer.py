"""What all quantized linear layers share: state, gradient to the input, and the way back to nn.Linear."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from app.models.quantization.config import Scheme


class QuantizedLinear(nn.Module):
    """A frozen linear layer. Its state is plain buffers, made empty; `store` or `load_state_dict` fills them.

    The gradient to the input is that of the dequantized layer, in every scheme: rounding of activations passes it
    straight through (Bengio et al. 2013, arXiv:1308.3432). The weight is dequantized again for it, not kept.
    """

    scheme: ClassVar[Scheme]
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)

    @classmethod
    def like(cls, linear: nn.Linear) -> Self:
        """Empty, with the shapes and on the device of `linear`."""
        has_bias = linear.bias is not None
        return cls(linear.in_features, linear.out_features, bias=has_bias, device=linear.weight.device)

    def store(self, weight: Tensor) -> None:
        """Quantize `weight` [out, in] in fp32 into the buffers."""
        raise NotImplementedError

    def dequantized_weight(self) -> Tensor:
        """[out, in] in fp32."""
        raise NotImplementedError

    def multiply(self, rows: Tensor) -> Tensor:
        """[rows, out] of `rows` [rows, in], in their dtype, with the bias, without a gradient."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] of `x` [..., in], in its dtype, or in autocast's."""
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # Within, autocast would round the integers' sums.
            with torch.autocast(device, enabled=False):
                return self.forward(x.to(torch.get_autocast_dtype(device)))
        rows = x.reshape(-1, self.in_features)
        y = _Multiply.apply(rows, self) if rows.requires_grad else self.multiply(rows)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def dequantized(self) -> nn.Linear:
        """The layer that this one stands for, in fp32."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantized_weight())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear

    @property
    def num_bytes(self) -> int:
        """Of all that the state dict holds; forms that kernels want are made at first use and not counted."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.bfloat16()` is about activations: scales keep their precision, and so the weights.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantized_weight().to(gradient.dtype), None
