"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685).

A frozen linear layer W gets a trained update of rank r beside it: y = W x + s · B A x, with s = alpha / r, or
alpha / √r where it is rank-stabilized (Kalajdzievski 2023, arXiv:2312.03732).

DoRA (Liu et al. 2024, arXiv:2402.09353) trains the length m of each row of the weight as well, and the update turns
only its direction: W' = m · (W + s B A) / ‖W + s B A‖, the norm taken over each row and treated as a constant.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.config.methods import LoraConfig
from app.errors import UserError
from app.models.decoder import Decoder
from app.models.quantization import QuantizedLinear

Linear = nn.Linear | QuantizedLinear


def weight_of(linear: Linear) -> Tensor:
    """[out, in]; dequantized where it is stored otherwise."""
    return linear.dequantized_weight() if isinstance(linear, QuantizedLinear) else linear.weight


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Products in the tensors' own dtype, which matters where merged and unmerged weights must agree."""
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


class LoraLinear(nn.Module):
    """`base`, frozen, plus the low-rank update. Over a quantized base, of 4 bits in the paper, this is QLoRA
    (Dettmers et al. 2023, arXiv:2305.14314)."""

    def __init__(self, base: Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base = base
        self.scale = config.alpha / (config.rank**0.5 if config.rank_stabilized else config.rank)
        self.dropout = nn.Dropout(config.dropout)
        device = weight_of(base).device
        # fp32 whatever the base is stored in: small updates would drown in bf16's rounding
        self.lora_a = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        # B starts at zero so that step 0 equals the base model; A as nn.Linear does, as in the authors' code.
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        plain = self.base(rows)
        return self.update(rows, plain, may_overwrite=True).view(*x.shape[:-1], plain.shape[-1])

    def update(self, x: Tensor, plain: Tensor, *, may_overwrite: bool = False) -> Tensor:
        """[..., out] of `x` [..., in], of which the base makes `plain`, in whose place it may be."""
        low = F.linear(self.dropout(x), self.lora_a)  # [..., rank]
        # One product that scales and adds, in place of a product and two more passes over the output. Autograd keeps
        # no output of a linear layer, but it does not let views be overwritten that others have made.
        # A compiler fuses by itself, and would break the graph at the question whether it is a view.
        may_overwrite = may_overwrite and not torch.compiler.is_compiling()
        if may_overwrite and plain.dtype == low.dtype and not plain._is_view():
            return plain.addmm_(low, self.lora_b.T.to(low.dtype), alpha=self.scale)
        updated = torch.addmm(plain.flatten(0, -2), low.flatten(0, -2), self.lora_b.T, alpha=self.scale)
        return updated.view(plain.shape)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with the update in its weight, in fp32."""
        linear = self.base.dequantized() if isinstance(self.base, QuantizedLinear) else self.base
        linear.weight.copy_(self.merged_weight())
        return linear

    def merged_weight(self) -> Tensor:
        """[out, in] in fp32."""
        return self.updated_weight()

    def updated_weight(self) -> Tensor:
        """W + s · B A [out, in], in fp32."""
        with without_autocast(self.lora_a):
            return weight_of(self.base).float() + self.scale * (self.lora_b @ self.lora_a)


class DoraLinear(LoraLinear):
    """The update turns the rows of `base`, and `magnitude` [out] is their length."""

    def __init__(self, base: Linear, config: LoraConfig) -> None:
        super().__init__(base, config)
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(weight_of(base).detach().float(), dim=1))
        self._fixed_stretch: Tensor | None = None

    def fix(self) -> None:
        """The weights will not change any more: what follows from them alone is computed once."""
        self._fixed_stretch = self._stretch().detach()

    def update(self, x: Tensor, plain: Tensor, *, may_overwrite: bool = False) -> Tensor:
        turned = super().update(x, plain, may_overwrite=may_overwrite)
        stretch = (self._stretch() if self._fixed_stretch is None else self._fixed_stretch).to(turned.dtype)
        bias = self.base.bias  # read after the base's call, at whose end ZeRO-3 takes it away
        return turned * stretch if bias is None else (turned - bias) * stretch + bias

    def merged_weight(self) -> Tensor:
        return self._stretch().unsqueeze(1) * self.updated_weight()

    def _stretch(self) -> Tensor:
        """[out]: what brings each updated row to its length."""
        with torch.no_grad():
            norm = torch.linalg.vector_norm(self.updated_weight(), dim=1)
        return self.magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)  # a row of zeros has no direction


def apply(model: Decoder, config: LoraConfig) -> None:
    """Wrap the frozen linear layers whose names end in one of `config.targets`, in place.

    Raises:
        UserError: a target matches no layer, all that match train anyway, or the rank is as large as a layer that it
            would update.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for target in config.targets:
        if not any(name.endswith(f".{target}") for name in linears):
            known = sorted({name.split(".", 2)[-1] for name in linears})
            raise UserError(f"method.targets={target!r} matches no layer; the model has: {', '.join(known)}")
    endings = tuple(f".{target}" for target in config.targets)
    chosen = {
        name: linear
        for name, linear in linears.items()
        if name.endswith(endings) and not weight_of(linear).requires_grad
    }
    if not chosen:
        raise UserError("method.type='lora' finds nothing to update: all of its targets train already")
    for name, linear in chosen.items():
        smallest = min(linear.in_features, linear.out_features)
        if config.rank >= smallest:
            raise UserError(f"method.rank={config.rank} must be below {smallest}, the smaller side of {name}")
        parent, _, attribute = name.rpartition(".")
        wrapper = DoraLinear if config.dora else LoraLinear
        setattr(model.get_submodule(parent), attribute, wrapper(linear, config))


def merge(model: Decoder) -> None:
    """Fold every update into its layer and take the wrappers away, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.merged())
