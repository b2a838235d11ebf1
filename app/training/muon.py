"""The optimizer of pretraining: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the blocks' matrices.

Muon orthogonalises the momentum of a weight matrix; from scratch it needs about half as many tokens as AdamW to reach
a loss. Embeddings and vectors, for which it is not meant, take AdamW. Same interface as `PlainOptimizer`; over
several workers gradients are averaged and every worker makes the same update.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from app.config.schema import OptimizerConfig
from app.training.checkpointing import Checkpoint
from app.training.optimizer import MOMENTS, adamw, adamw_state, trained_parameters
from app.training.workers import world_size

_MOMENTUM = "momentum_buffer"


class MuonOptimizer:
    def __init__(self, model: nn.Module, config: OptimizerConfig, *, resume: Checkpoint | None = None) -> None:
        parameters = trained_parameters(model)
        self._matrices = {name: p for name, p in parameters.items() if p.dim() == 2 and name.startswith("blocks.")}
        self._others = {name: p for name, p in parameters.items() if name not in self._matrices}
        self._clip_norm = config.clip_norm
        self._muon = torch.optim.Muon(
            list(self._matrices.values()),
            lr=0.0,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",  # so that one learning rate serves both
        )
        self._adamw = adamw(self._others, weight_decay=config.weight_decay)
        if resume is not None:
            self._restore(resume)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        parameters = [*self._matrices.values(), *self._others.values()]
        if world_size() > 1:
            for parameter in parameters:
                assert parameter.grad is not None  # every weight is in the loss
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(world_size())
        norm = nn.utils.clip_grad_norm_(parameters, self._clip_norm)
        for optimizer in (self._muon, self._adamw):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
        return norm.item()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().float().cpu().clone() for name, p in (self._matrices | self._others).items()}

    def moments(self) -> dict[str, Tensor]:
        state = self._muon.state
        muon = {f"{name}.{_MOMENTUM}": state[p][_MOMENTUM].cpu().clone() for name, p in self._matrices.items()}
        adamw = {
            f"{name}.{moment}": self._adamw.state[p][moment].cpu().clone()
            for name, p in self._others.items()
            for moment in MOMENTS
        }
        return muon | adamw

    def _restore(self, checkpoint: Checkpoint) -> None:
        for name, parameter in self._matrices.items():
            momentum = checkpoint.moments[f"{name}.{_MOMENTUM}"].to(parameter.device, copy=True)
            self._muon.state[parameter] = {_MOMENTUM: momentum}
        for name, parameter in self._others.items():
            self._adamw.state[parameter] = adamw_state(checkpoint, name, device=parameter.device)
