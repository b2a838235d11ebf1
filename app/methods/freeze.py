"""Selective freezing: train the model's own weights, but for some parts.

The old way of transfer learning: lower layers, which hold what is general, stay; upper ones adapt (Howard & Ruder 2018,
ULMFiT, arXiv:1801.06146; Lee, Tang & Lin 2019, "What Would Elsa Do?", arXiv:1911.03090, on transformers).
"""

import re

from torch import nn

from app.config.methods import FreezeConfig
from app.errors import UserError
from app.models.decoder import Decoder


def apply(model: Decoder, config: FreezeConfig) -> None:
    """Unfreeze all but `config.frozen`, in place.

    Raises:
        UserError: a name matches no part of the model, or nothing would train.
    """
    frozen = {id(parameter) for name in config.frozen for parameter in _parameters(model, name)}
    trained = [parameter for parameter in model.parameters() if id(parameter) not in frozen]
    if not trained:
        raise UserError(f"method.frozen={list(config.frozen)} freezes every weight; leave some to train")
    for parameter in trained:
        parameter.requires_grad_(True)


def merge(model: Decoder) -> None:
    """Nothing to fold: the trained weights are the model's own."""


def _parameters(model: Decoder, name: str) -> list[nn.Parameter]:
    """What `name` stands for."""
    if name == "embeddings":
        return [p for key, p in model.named_parameters() if key.startswith(("token_embedding", "position_embedding"))]
    if name == "head":  # tied
        return list(model.token_embedding.parameters())
    if span := re.fullmatch(r"blocks\.(\d+)-(\d+)", name):
        first, last = int(span[1]), int(span[2])
        if first <= last < len(model.blocks):
            return [p for block in model.blocks[first : last + 1] for p in block.parameters()]
    found = [p for key, p in model.named_parameters() if key == name or key.startswith(f"{name}.")]
    if not found:
        raise UserError(
            f"method.frozen={name!r} matches nothing; the model has: embeddings, head, final_norm, "
            f"blocks.0-{len(model.blocks) - 1}, and in a block, as in blocks.0.attn: "
            f"{', '.join(_names_in_block(model))}"
        )
    return found


def _names_in_block(model: Decoder) -> list[str]:
    return [name for name, module in model.blocks[0].named_modules() if name and any(True for _ in module.parameters())]
