"""A decoder's linear layers to quantized ones and back, in place."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from app.errors import UserError
from app.models.decoder import Decoder
from app.models.quantization.calibration import calibrate
from app.models.quantization.config import QuantizationConfig, Scheme
from app.models.quantization.int8 import Int8Dynamic, Int8Static, Int8Weight
from app.models.quantization.layer import QuantizedLinear
from app.models.quantization.nf4 import Nf4Linear

_LAYERS: dict[Scheme, type[QuantizedLinear]] = {
    "int8_dynamic": Int8Dynamic,
    "int8_static": Int8Static,
    "int8_weight": Int8Weight,
    "nf4": Nf4Linear,
}


class Sizes(NamedTuple):
    """Bytes of the layers that are quantized, biases included."""

    quantized: int
    fp32: int
    """What they would take in fp32."""
    bf16: int
    """The same in bf16."""


def quantize(model: Decoder, config: QuantizationConfig, *, calibration: Iterable[Tensor] | None = None) -> None:
    """Replace the linear layers that `config.targets` names, in place.

    `calibration`, for int8_static alone, yields ids [batch, time] on the model's device, without padding.

    Raises:
        UserError: the model is quantized already, a target matches no layer, or calibration is missing, empty, or
            given to a scheme that needs none.
    """
    linears = _chosen(model, config)
    largest = _ranges(model, config, linears, calibration)
    for name, linear in linears.items():
        model.set_submodule(name, _quantized(linear, config, largest.get(name)))


def prepare(model: Decoder, config: QuantizationConfig) -> None:
    """The same with empty layers, for a `model` on the `meta` device that `load_state_dict(..., assign=True)` fills.

    Raises:
        UserError: the model is quantized already, or a target matches no layer.
    """
    for name, linear in _chosen(model, config).items():
        model.set_submodule(name, _LAYERS[config.scheme].like(linear))


def dequantize(model: nn.Module) -> None:
    """Put nn.Linear layers in fp32 in the place of the quantized ones below `model`, which may be a block alone."""
    for name, layer in _quantized_layers(model).items():
        model.set_submodule(name, layer.dequantized())


def quantized_bytes(model: nn.Module) -> Sizes:
    """What quantization saves, on the layers that it touched."""
    layers = _quantized_layers(model).values()
    numbers = sum((layer.in_features + (layer.bias is not None)) * layer.out_features for layer in layers)
    return Sizes(sum(layer.num_bytes for layer in layers), fp32=4 * numbers, bf16=2 * numbers)


@torch.no_grad()
def _quantized(linear: nn.Linear, config: QuantizationConfig, largest: Tensor | None) -> QuantizedLinear:
    layer = _LAYERS[config.scheme].like(linear)
    weight = linear.weight.float()
    if isinstance(layer, Int8Static):
        assert largest is not None
        layer.store_calibrated(weight, largest)
    else:
        layer.store(weight)
    if linear.bias is not None:
        layer.bias = linear.bias.detach().float().clone()
    return layer.train(linear.training)


def _ranges(
    model: Decoder, config: QuantizationConfig, linears: Iterable[str], calibration: Iterable[Tensor] | None
) -> dict[str, Tensor]:
    if config.scheme != "int8_static":
        if calibration is not None:
            raise UserError(f"quantization.scheme={config.scheme!r} takes no calibration data; leave them out")
        return {}
    largest = {} if calibration is None else calibrate(model, calibration, linears)
    if not largest:
        raise UserError(
            "quantization.scheme='int8_static' needs calibration data with at least one token; give some, or use "
            "'int8_dynamic', which needs none"
        )
    return largest


def _chosen(model: Decoder, config: QuantizationConfig) -> dict[str, nn.Linear]:
    if already := _quantized_layers(model):
        scheme = next(iter(already.values())).scheme
        raise UserError(
            f"quantization.scheme={config.scheme!r}: the model is quantized already, as {scheme!r}; start from the one "
            "in full precision"
        )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in config.targets:
        if not any(name.endswith(f".{target}") for name in linears):
            known = sorted({name.split(".", 2)[-1] for name in linears})
            raise UserError(f"quantization.targets={target!r} matches no layer; the model has: {', '.join(known)}")
    endings = tuple(f".{target}" for target in config.targets)
    return {name: linear for name, linear in linears.items() if name.endswith(endings)}


def _quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
