"""How gradients become weights: the interface that the loop uses, and its form for one plain process.

The form for several workers is in `deepspeed.py`. Both hold AdamW's state as full tensors by parameter name when
asked for it, so that a checkpoint fits any number of workers.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from app.config.schema import OptimizerConfig
from app.training.checkpointing import Checkpoint
from app.training.precision import LEFT_OUT

MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS = (0.9, 0.999)


class Optimizer(Protocol):
    def backward(self, loss: Tensor, *, scale: float = 1.0, is_last: bool = True) -> None:
        """Add the gradients of `loss` · `scale`, to be averaged over the workers; `is_last` before the step."""

    def step(self, learning_rate: float, *, weight_decay: float | None = None, scale: float = 1.0) -> float:
        """Divide the gradients by `scale`, clip, update, clear them; returns their global L2 norm before clipping.

        With a `scale`, gradients that are not finite update nothing. Without a `weight_decay` it is that of before.
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """Trained weights by name, fp32 on CPU. A collective call: every worker must make it."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """AdamW's moments as `NAME.exp_avg` and `NAME.exp_avg_sq`, full size, on CPU. A collective call."""
        ...


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adamw(parameters: Mapping[str, nn.Parameter], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: biases, norms and other vectors are not what over-fits."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() <= 1]
    groups = [
        {"params": group, "weight_decay": decay, "decays": group is matrices}
        for group, decay in ((matrices, weight_decay), (vectors, 0.0))
        if group
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def set_rates(groups: Iterable[dict[str, Any]], *, learning_rate: float, weight_decay: float | None) -> None:
    """Of the groups that `adamw` makes; without a `weight_decay` it stays."""
    for group in groups:
        group["lr"] = learning_rate
        if weight_decay is not None and group["decays"]:
            group["weight_decay"] = weight_decay


def adamw_state(checkpoint: Checkpoint, name: str, *, device: torch.device) -> dict[str, Tensor]:
    """What torch's AdamW keeps for parameter `name`, on `device`."""
    moments = {moment: checkpoint.moments[f"{name}.{moment}"].to(device, copy=True) for moment in MOMENTS}
    return {"step": torch.tensor(updates_made(checkpoint), device=device), **moments}


def moment_of(adamw: torch.optim.AdamW, parameter: nn.Parameter, moment: str) -> Tensor:
    """A copy of it; zero as long as fp16 has left out every step, before the first of which torch's AdamW has none."""
    state = adamw.state.get(parameter)
    return state[moment].clone() if state else torch.zeros_like(parameter, requires_grad=False)


def updates_made(checkpoint: Checkpoint) -> float:
    """What AdamW counts as its steps: the run's without those that fp16 left out."""
    return float(checkpoint.step - checkpoint.state.get("metrics", {}).get(LEFT_OUT, 0))


def unscale_and_clip(parameters: Iterable[nn.Parameter], *, scale: float, clip_norm: float) -> Tensor:
    """Divide the gradients by `scale` and clip them, in place; returns their L2 norm between the two."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if scale != 1.0:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.div_(scale)
    return nn.utils.clip_grad_norm_(parameters, clip_norm)


class PlainOptimizer:
    """AdamW in one process. With `resume`, it goes on from that checkpoint's moments."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, resume: Checkpoint | None = None) -> None:
        self._parameters = trained_parameters(model)
        self._adamw = adamw(self._parameters, weight_decay=config.weight_decay)
        self._clip_norm = config.clip_norm
        if resume is not None:
            for name, parameter in self._parameters.items():
                self._adamw.state[parameter] = adamw_state(resume, name, device=parameter.device)

    def backward(self, loss: Tensor, *, scale: float = 1.0, is_last: bool = True) -> None:
        (loss * scale).backward()

    def step(self, learning_rate: float, *, weight_decay: float | None = None, scale: float = 1.0) -> float:
        norm = unscale_and_clip(self._parameters.values(), scale=scale, clip_norm=self._clip_norm)
        set_rates(self._adamw.param_groups, learning_rate=learning_rate, weight_decay=weight_decay)
        if scale == 1.0 or norm.isfinite():  # in this order: to ask is to wait for a GPU
            self._adamw.step()
        self._adamw.zero_grad()
        return norm.item()

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().float().cpu().clone() for name, parameter in self._parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        return {
            f"{name}.{moment}": moment_of(self._adamw, parameter, moment).cpu()
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }
