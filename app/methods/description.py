"""What a technique does to a model, in figures: what trains, and what memory training takes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.assets import model_folder
from app.config.transfer import DescribeConfig
from app.methods import apply_method
from app.models.checkpoints import read_config
from app.models.decoder import GPT2_SIZES, Decoder

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
    shape = GPT2_SIZES.get(config.model) or read_config(model_folder(config.model))
    with torch.device("meta"):
        model = Decoder(shape)
        if config.method is not None:
            apply_method(model, config.method)
        else:
            model.requires_grad_(False)
    return describe(model)


def describe(model: Decoder) -> Description:
    """`model` by module; it may lie on the `meta` device, where it takes no memory."""
    rows: dict[tuple[str, bool], ModuleRow] = {}
    for name, tensor in _tensors(model):
        module, _, _ = name.rpartition(".")
        pattern = re.sub(r"^blocks\.\d+", "blocks.*", module)
        trains = tensor.requires_grad
        row = rows.setdefault((pattern, trains), ModuleRow(pattern, [], trains))
        if found := re.match(r"blocks\.(\d+)\.", name):
            block = int(found[1])
            if block not in row.blocks:
                row.blocks.append(block)
        if not row.blocks or row.blocks == [row.blocks[0]]:
            row.shapes.append(tuple(tensor.shape))
        row.parameters += tensor.numel()
        row.weight_bytes += tensor.numel() * tensor.element_size()
    return Description(list(rows.values()))


def _tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _ranges(numbers: list[int]) -> str:
    """`0-7,9` of [0, …, 7, 9]."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
