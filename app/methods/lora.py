"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685).

A frozen linear layer W gets a trained update of rank r beside it: y = W x + (alpha / r) · B A x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.config.schema import LoraConfig
from app.errors import UserError


class LoraLinear(nn.Module):
    """`base`, frozen, plus the low-rank update."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base = base
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        device = base.weight.device
        # fp32 whatever the base is stored in: small updates would drown in bf16's rounding
        self.lora_a = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        # B starts at zero so that step 0 equals the base model; A as nn.Linear does, as in the authors' code.
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return self.base(x) + self.scale * update

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with the update added to its weight, in fp32."""
        update = self.scale * (self.lora_b @ self.lora_a)
        self.base.weight.copy_(self.base.weight.float() + update)
        return self.base


def apply(model: nn.Module, config: LoraConfig) -> None:
    """Freeze `model` and wrap the linear layers whose names end in one of `config.targets`, in place.

    Raises:
        UserError: a target matches no layer, or the rank is as large as a layer it would update.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in config.targets:
        if not any(name.endswith(f".{target}") for name in linears):
            known = sorted({name.split(".", 2)[-1] for name in linears})
            raise UserError(f"method.targets={target!r} matches no layer; the model has: {', '.join(known)}")
    model.requires_grad_(False)
    for name, linear in linears.items():
        if not name.endswith(tuple(f".{target}" for target in config.targets)):
            continue
        smallest = min(linear.in_features, linear.out_features)
        if config.rank >= smallest:
            raise UserError(f"method.rank={config.rank} must be below {smallest}, the smaller side of {name}")
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LoraLinear(linear, config))


def merge(model: nn.Module) -> None:
    """Fold every update into its layer and take the wrappers away, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.merged())
