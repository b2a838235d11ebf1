"""Techniques over a base that others use too: its tensors shared, its layers computed once for the rows of all."""

import copy
from typing import Any

from torch import Tensor, nn

from app.methods.adapter import Adapted
from app.methods.lora import LoraLinear
from app.models.decoder import Decoder


def shared_copy(base: Decoder) -> tuple[Decoder, dict[int, nn.Module]]:
    """A copy of the modules of `base` around its own tensors, and which module is the copy of which (by id)."""
    memo: dict[int, Any] = {}
    for parameter in base.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
    for buffer in base.buffers():
        memo[id(buffer)] = buffer
    shared = copy.deepcopy(base, memo)
    return shared, memo


def updated(layer: Any, base: Any, x: Tensor, y: Tensor) -> Tensor:
    """What `layer` makes of `x`, of which `base` makes `y`."""
    if isinstance(layer, LoraLinear):
        return layer.update(x, updated(layer.base, base, x, y))
    if isinstance(layer, Adapted):
        return layer.update(updated(layer.base, base, x, y))
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return layer(x)
    if layer.bias is not None and layer.bias.data_ptr() != base.bias.data_ptr():
        return y + (layer.bias - base.bias)
    return y
