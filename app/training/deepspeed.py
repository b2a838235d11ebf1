"""The optimizer over many workers: DeepSpeed averages gradients and, with ZeRO, partitions AdamW's state.

Same interface as `PlainOptimizer`. What it takes and gives as a checkpoint is whole tensors by parameter name, never
a partition, so a run may go on with another number of workers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from app.config.schema import DeepSpeedConfig, OptimizerConfig
from app.training.checkpointing import Checkpoint
from app.training.optimizer import MOMENTS, adamw, adamw_state, trained_parameters


class DeepSpeedOptimizer:
    """AdamW under DeepSpeed; torch.distributed is initialised. With `resume`, it goes on from its moments."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        *,
        deepspeed: DeepSpeedConfig,
        resume: Checkpoint | None = None,
    ) -> None:
        import deepspeed as ds

        # On CPU DeepSpeed compiles a shared-memory all-reduce at start, a minute of C++; gloo does without it.
        ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._parameters = trained_parameters(model)
        self._adamw = adamw(self._parameters, weight_decay=config.weight_decay)
        self._engine, *_ = ds.initialize(
            model=model,
            optimizer=self._adamw,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # asked for, and used for its own reports only
                "gradient_clipping": config.clip_norm,
                "zero_optimization": {"stage": deepspeed.zero_stage},
                "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own wants a C++ build on CPU
                "steps_per_print": 2**31,
            },
        )
        self._is_partitioned = deepspeed.zero_stage > 0
        if self._is_partitioned:
            self._fill_partitions(resume)
        elif resume is not None:
            for name, parameter in self._parameters.items():
                self._adamw.state[parameter] = adamw_state(resume, name, device=parameter.device)

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)  # DeepSpeed's own count would divide the loss by it
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # Without ZeRO, in fp32, DeepSpeed clips and does not say at what norm; the averaged gradients are here still.
        norm = None if self._is_partitioned else self._gradient_norm()
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def _gradient_norm(self) -> float:
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return nn.utils.get_total_norm(gradients).item()

    def weights(self) -> dict[str, Tensor]:
        # these stages leave the parameters themselves whole on every worker
        return {name: parameter.detach().float().cpu().clone() for name, parameter in self._parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        return {
            f"{name}.{moment}": self._moment(parameter, moment).cpu()
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if not self._is_partitioned:
            return self._adamw.state[parameter][moment].clone()
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment)

    def _fill_partitions(self, resume: Checkpoint | None) -> None:
        """AdamW's state of this worker's flat partitions, from `resume` or zero.

        Made before the first step in either case: DeepSpeed links parameters to their state after it has stepped one
        group, and misses that of the groups to come.
        """
        names = {parameter: name for name, parameter in self._parameters.items()}
        zero: Any = self._engine.optimizer
        for group, partition in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            state = {"step": torch.tensor(float(resume.step if resume else 0), device=partition.device)}
            state |= {moment: torch.zeros_like(partition.data) for moment in MOMENTS}
            if resume is not None:
                for parameter in group:
                    _fill_fragments(state, parameter, resume, names[parameter])
            self._adamw.state[partition] = state


def _fill_fragments(state: dict[str, Tensor], parameter: Any, checkpoint: Checkpoint, name: str) -> None:
    """Copy the part of a parameter's moments that lies in this worker's flat partition, if any, to its place there."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return
    whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    for moment in MOMENTS:
        part = checkpoint.moments[f"{name}.{moment}"].flatten().narrow(0, whole.start, whole.numel)
        state[moment].narrow(0, flat.start, flat.numel).copy_(part)
