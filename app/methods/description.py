"""What a technique does to a model, in figures: what trains, and what memory training takes."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from app.assets import model_folder
from app.config.transfer import DescribeConfig
from app.methods import apply_method
from app.models.checkpoints import empty_decoder
from app.models.decoder import GPT2_SIZES, Decoder
from app.models.quantization import QuantizedLinear

GRADIENT_BYTES = 4
"""Per trained weight: fp32."""
OPTIMIZER_BYTES = 8
"""Per trained weight: AdamW's two moments, fp32."""


@dataclass
class ModuleRow:
    """Tensors of one module, or of the same module in several blocks."""

    name: str
    shapes: list[tuple[int, ...]]
    trains: bool
    blocks: list[int] = field(default_factory=list)
    """Which blocks have it, where it is in blocks."""
    parameters: int = 0
    weight_bytes: int = 0

    @property
    def full_name(self) -> str:
        return self.name.replace("*", _ranges(self.blocks))

    @property
    def gradient_bytes(self) -> int:
        return GRADIENT_BYTES * self.parameters if self.trains else 0

    @property
    def optimizer_bytes(self) -> int:
        return OPTIMIZER_BYTES * self.parameters if self.trains else 0


@dataclass(frozen=True)
class Description:
    rows: list[ModuleRow]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def trained(self) -> int:
        return sum(row.parameters for row in self.rows if row.trains)


def describe_model(config: DescribeConfig) -> Description:
    """`config.model` as `config.method` would train it; built without memory, from the shapes alone.

    Raises:
        UserError: there is no such model, or the technique does not fit it.
    """
    shape = GPT2_SIZES.get(config.model)
    with torch.device("meta"):
        model = Decoder(shape) if shape else empty_decoder(model_folder(config.model))
        if config.method is not None:
            apply_method(model, config.method)
        else:
            model.requires_grad_(False)
    return describe(model)


def describe(model: Decoder) -> Description:
    """`model` by module; it may lie on the `meta` device, where it takes no memory."""
    rows: dict[tuple[str, bool], ModuleRow] = {}
    for name, tensors in _modules(model):
        pattern = re.sub(r"^blocks\.\d+", "blocks.*", name)
        for trains in (False, True):
            chosen = [tensor for tensor in tensors if tensor.trains == trains]
            if not chosen:
                continue
            row = rows.setdefault((pattern, trains), ModuleRow(pattern, [tensor.shape for tensor in chosen], trains))
            if found := re.match(r"blocks\.(\d+)", name):
                row.blocks.append(int(found[1]))
            row.parameters += sum(math.prod(tensor.shape) for tensor in chosen)
            row.weight_bytes += sum(tensor.num_bytes for tensor in chosen)
    return Description(list(rows.values()))


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    num_bytes: int
    trains: bool


def _modules(model: Decoder) -> Iterator[tuple[str, list[_Tensor]]]:
    """Each module that holds weights itself, and those; a quantized layer's are told as if it were not."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            bias = [] if module.bias is None else [_Tensor((module.out_features,), module.bias.nbytes, trains=False)]
            num_bytes = module.num_bytes - sum(tensor.num_bytes for tensor in bias)
            yield name, [_Tensor((module.out_features, module.in_features), num_bytes, trains=False), *bias]
        elif own := list(module.parameters(recurse=False)):
            yield name, [_Tensor(tuple(p.shape), p.nbytes, p.requires_grad) for p in own]


def _ranges(numbers: list[int]) -> str:
    """`0-7,9` of [0, …, 7, 9]."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
