"""The optimizer of pretraining: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the blocks' matrices.

Muon orthogonalises the momentum of a weight matrix; from scratch it needs about half as many tokens as AdamW to reach
a loss. Embeddings and vectors, for which it is not meant, take AdamW. Same interface as `PlainOptimizer`; over
several workers gradients are averaged and every worker makes the same update.

Not `torch.optim.Muon`: that one iterates in bf16 always, which takes 25 times as long as fp32 on a CPU without bf16
instructions. The update is the same.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from app.config.schema import OptimizerConfig
from app.models.precision import compute_dtype
from app.training.checkpointing import Checkpoint
from app.training.optimizer import (
    MOMENTS,
    adamw,
    adamw_state,
    moment_of,
    set_rates,
    trained_parameters,
    unscale_and_clip,
)
from app.training.workers import world_size

_MOMENTUM = "momentum_buffer"
_DECAY = 0.95
"""Of the momentum, which is Nesterov's."""


class MuonOptimizer:
    def __init__(self, model: nn.Module, config: OptimizerConfig, *, resume: Checkpoint | None = None) -> None:
        parameters = trained_parameters(model)
        self._matrices = {name: p for name, p in parameters.items() if p.dim() == 2 and name.startswith("blocks.")}
        self._others = {name: p for name, p in parameters.items() if name not in self._matrices}
        self._clip_norm = config.clip_norm
        self._weight_decay = config.weight_decay
        self._momentum = {name: torch.zeros_like(p) for name, p in self._matrices.items()}
        self._adamw = adamw(self._others, weight_decay=config.weight_decay)
        if resume is not None:
            self._restore(resume)

    def backward(self, loss: Tensor, *, scale: float = 1.0, is_last: bool = True) -> None:
        (loss * scale).backward()

    def step(self, learning_rate: float, *, weight_decay: float | None = None, scale: float = 1.0) -> float:
        self._weight_decay = self._weight_decay if weight_decay is None else weight_decay
        parameters = [*self._matrices.values(), *self._others.values()]
        if world_size() > 1:
            for parameter in parameters:
                assert parameter.grad is not None  # every weight is in the loss
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(world_size())
        norm = unscale_and_clip(parameters, scale=scale, clip_norm=self._clip_norm)
        if scale == 1.0 or norm.isfinite():
            self._step_matrices(learning_rate)
            set_rates(self._adamw.param_groups, learning_rate=learning_rate, weight_decay=weight_decay)
            self._adamw.step()
        for parameter in parameters:
            parameter.grad = None
        return norm.item()

    @torch.no_grad()
    def _step_matrices(self, learning_rate: float) -> None:
        """All of one shape together: a matrix by itself is too small to keep a GPU, or a CPU's cores, busy."""
        by_shape: dict[torch.Size, list[str]] = {}
        for name, weight in self._matrices.items():
            by_shape.setdefault(weight.shape, []).append(name)
        for shape, names in by_shape.items():
            weights, momenta = ([tensors[name] for name in names] for tensors in (self._matrices, self._momentum))
            gradients = [weight.grad for weight in weights if weight.grad is not None]  # every weight is in the loss
            torch._foreach_lerp_(momenta, gradients, 1 - _DECAY)
            updates = orthogonalised(torch.stack(gradients).lerp_(torch.stack(momenta), _DECAY))
            torch._foreach_mul_(weights, 1 - learning_rate * self._weight_decay)
            # Scaled to AdamW's usual RMS, so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982).
            torch._foreach_add_(weights, updates.unbind(), alpha=-learning_rate * 0.2 * max(shape) ** 0.5)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().float().cpu().clone() for name, p in (self._matrices | self._others).items()}

    def moments(self) -> dict[str, Tensor]:
        muon = {f"{name}.{_MOMENTUM}": momentum.cpu().clone() for name, momentum in self._momentum.items()}
        adamw = {
            f"{name}.{moment}": moment_of(self._adamw, p, moment).cpu()
            for name, p in self._others.items()
            for moment in MOMENTS
        }
        return muon | adamw

    def _restore(self, checkpoint: Checkpoint) -> None:
        for name, momentum in self._momentum.items():
            momentum.copy_(checkpoint.moments[f"{name}.{_MOMENTUM}"])
        for name, parameter in self._others.items():
            self._adamw.state[parameter] = adamw_state(checkpoint, name, device=parameter.device)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Near to U V^T of each of `matrices` = U S V^T, [matrices, rows, columns], by five Newton-Schulz steps (Jordan's
    coefficients)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(compute_dtype("auto", matrices.device))
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)
