"""Bottleneck adapters: Parameter-Efficient Transfer Learning for NLP (Houlsby et al. 2019, arXiv:1902.00751).

Behind a sublayer, before its result joins the residual stream: h + W_up · gelu(W_down · h).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.config.methods import AdapterConfig
from app.errors import UserError
from app.models.decoder import Decoder

NO_MERGE = "between its two matrices stands a nonlinearity, so no plain weights compute the same; serve the delta"

_PLACES = {"attention_and_mlp": ("attn.out", "mlp.down"), "mlp": ("mlp.down",)}


class Adapted(nn.Module):
    """`base`, frozen, with an adapter behind it."""

    def __init__(self, base: nn.Module, *, width: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.base = base
        self.adapter_down = nn.Linear(width, size, device=device)
        self.adapter_up = nn.Linear(size, width, device=device)
        # The paper starts near the identity; at zero step 0 equals the base model.
        nn.init.zeros_(self.adapter_up.weight)
        nn.init.zeros_(self.adapter_up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.update(self.base(x))

    def update(self, hidden: Tensor) -> Tensor:
        """What the adapter makes of the sublayer's result."""
        return hidden + self.adapter_up(F.gelu(self.adapter_down(hidden)))


def apply(model: Decoder, config: AdapterConfig) -> None:
    """Put adapters behind the sublayers of each block that does not train as a whole, in place.

    Raises:
        UserError: the bottleneck is as wide as the model, or every block trains anyway.
    """
    width, device = model.config.width, model.token_embedding.weight.device
    if config.size >= width:
        raise UserError(f"method.size={config.size} must be below {width}, the width of the model")
    blocks = [block for block in model.blocks if not all(p.requires_grad for p in block.parameters())]
    if not blocks:
        raise UserError("method.type='adapter' finds no block to adapt: every weight of them trains already")
    for block in blocks:
        for place in _PLACES[config.placement]:
            parent, _, attribute = place.rpartition(".")
            module = block.get_submodule(parent)
            adapted = Adapted(getattr(module, attribute), width=width, size=config.size, device=device)
            setattr(module, attribute, adapted)
