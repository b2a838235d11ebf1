"""Extra transformer blocks: LLaMA Pro, Progressive LLaMA with Block Expansion (Wu et al. 2024, arXiv:2401.02415).

New blocks, copies of the ones below them, stand between the frozen ones and train alone. The projections into the
residual stream start at zero, so that a new block passes its input on and step 0 equals the base model.
"""

import copy
import dataclasses
from typing import cast

import torch
from torch import nn

from app.config.methods import ExtraBlockConfig
from app.models.decoder import Block, Decoder
from app.models.quantization import dequantize


@torch.no_grad()
def apply(model: Decoder, config: ExtraBlockConfig) -> None:
    """Insert `config.count` blocks, evenly over the depth, the last at the end, in place."""
    old = list(model.blocks)
    # a new block follows the old ones of these numbers
    places = [round((index + 1) * len(old) / config.count) - 1 for index in range(config.count)]
    blocks: list[nn.Module] = []
    for number, block in enumerate(old):
        blocks.append(block)
        blocks.extend(_identity_block(block) for _ in range(places.count(number)))
    blocks[:0] = [_identity_block(old[0]) for _ in range(places.count(-1))]
    model.blocks = nn.ModuleList(blocks)
    for layer, block in enumerate(blocks):
        cast(Block, block).attn.layer = layer
    model.config = dataclasses.replace(model.config, num_layers=len(blocks))


def merge(model: Decoder) -> None:
    """Nothing to fold: the model has more layers now, and is plain."""


def _identity_block(below: nn.Module) -> nn.Module:
    """A trainable copy of `below`, in full precision, that adds nothing to its input yet."""
    block = copy.deepcopy(below)
    dequantize(block)
    for projection in (block.get_submodule("attn.out"), block.get_submodule("mlp.down")):
        for parameter in projection.parameters():
            parameter.zero_()
    return block.requires_grad_(True)
