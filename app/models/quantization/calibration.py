"""Ranges of activations, seen on data."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from app.models.decoder import Decoder


@torch.no_grad()
def calibrate(model: Decoder, batches: Iterable[Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The largest absolute value fp32 [in] on each input channel of the layers `names`.

    `batches` are ids [batch, time]; every token counts, so rows should be full, or batches of one row. Empty if there
    are no tokens.
    """
    largest: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen = inputs[0].float().abs().flatten(0, -2).amax(dim=0)
        largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(see, name)) for name in names]
    try:
        for ids in batches:
            if ids.numel():
                model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return largest
