"""The optimizer over many workers: DeepSpeed averages gradients and, with ZeRO, partitions AdamW's state.

Same interface as `PlainOptimizer`. What it takes and gives as a checkpoint is whole tensors by parameter name, never
a partition, so a run may go on with another number of workers.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from app.config.schema import DeepSpeedConfig, OptimizerConfig
from app.training.checkpointing import Checkpoint
from app.training.optimizer import (
    MOMENTS,
    adamw,
    adamw_state,
    moment_of,
    set_rates,
    trained_parameters,
    unscale_and_clip,
    updates_made,
)
from app.training.workers import rank, world_size

WHOLE_BELOW = 100_000
"""Weights of fewer elements stay whole under ZeRO-3: to gather them costs more time than memory is won."""


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
        ds = import_deepspeed()
        # On CPU DeepSpeed compiles a shared-memory all-reduce at start, a minute of C++; gloo does without it.
        ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._clip_norm = config.clip_norm
        self._parameters = trained_parameters(model)
        self._adamw = adamw(self._parameters, weight_decay=config.weight_decay)
        self._engine, *_ = ds.initialize(
            model=model,
            optimizer=self._adamw,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # asked for, and used for its own reports only
                "gradient_clipping": config.clip_norm,
                "zero_optimization": {
                    "stage": deepspeed.zero_stage,
                    "stage3_param_persistence_threshold": WHOLE_BELOW,
                },
                "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own wants a C++ build on CPU
                "steps_per_print": 2**31,
            },
        )
        self._stage = deepspeed.zero_stage
        if self._stage:
            self._fill_partitions(resume)
        elif resume is not None:
            for name, parameter in self._parameters.items():
                self._adamw.state[parameter] = adamw_state(resume, name, device=parameter.device)

    def backward(self, loss: Tensor, *, scale: float = 1.0, is_last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)  # DeepSpeed's own count would divide the loss by it
        if self._stage:
            # What its own forward call does: under ZeRO-3 a micro-batch's gradients would replace those before it.
            self._engine.optimizer.clear_backward_seen_flag()
            self._engine.optimizer.loss_scale = scale  # by which it multiplies now and divides in its step
            self._engine.backward(loss)
        else:
            self._engine.backward(loss * scale)

    def step(self, learning_rate: float, *, weight_decay: float | None = None, scale: float = 1.0) -> float:
        set_rates(self._engine.optimizer.param_groups, learning_rate=learning_rate, weight_decay=weight_decay)
        if self._stage:
            self._engine.step()
            return math.inf if self._engine.optimizer.overflow else float(self._engine.get_global_grad_norm())
        # Without ZeRO, in fp32, DeepSpeed clips and does not say at what norm; the averaged gradients are here still.
        norm = unscale_and_clip(self._parameters.values(), scale=scale, clip_norm=self._clip_norm).item()
        if scale == 1.0 or math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm

    def weights(self) -> dict[str, Tensor]:
        if self._stage == 3:
            from deepspeed.utils import safe_get_full_fp32_param

            return {name: safe_get_full_fp32_param(p).cpu().clone() for name, p in self._parameters.items()}
        # the other stages leave the parameters themselves whole on every worker
        return {name: parameter.detach().float().cpu().clone() for name, parameter in self._parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        return {
            f"{name}.{moment}": self._moment(parameter, moment).cpu()
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if not self._stage:
            return moment_of(self._adamw, parameter, moment)
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment)

    def _fill_partitions(self, resume: Checkpoint | None) -> None:
        """AdamW's state of this worker's flat partitions, from `resume` or zero.

        Made and linked to the parameters before the first step in either case: DeepSpeed links them after it has
        stepped one group, and misses the state of the groups to come, or of all where fp16 leaves the first steps out.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero: Any = self._engine.optimizer
        is_whole = self._stage < 3
        partitions = zero.single_partition_of_fp32_groups if is_whole else zero.fp32_partitioned_groups_flat
        steps = updates_made(resume) if resume else 0.0
        for partition in partitions:
            state = {"step": torch.tensor(steps, device=partition.device)}
            self._adamw.state[partition] = state | {moment: torch.zeros_like(partition.data) for moment in MOMENTS}
        if is_whole:
            for group, partition in zip(zero.bit16_groups, partitions, strict=True):
                lazy_init_hp_params_optimizer_state(group, partition, self._adamw.state)
        if resume is None:
            return
        if not is_whole:
            for name, parameter in self._parameters.items():
                _fill_shares(parameter, resume, name)
            return
        names = {parameter: name for name, parameter in self._parameters.items()}
        for group, partition in zip(zero.bit16_groups, partitions, strict=True):
            for parameter in group:
                _fill_fragments(self._adamw.state[partition], parameter, resume, names[parameter])


def import_deepspeed() -> Any:
    """The module, without what it imports in vain, which is most of the four seconds that it would cost each worker."""
    if "deepspeed" in sys.modules:
        return sys.modules["deepspeed"]
    has_mlflow = "mlflow" in sys.modules
    if not has_mlflow:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # its autotuner's; None counts as not installed
    try:
        import deepspeed
    finally:
        if not has_mlflow:
            del sys.modules["mlflow"]
    from deepspeed.runtime import compiler

    before = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator  # torch's compiler, for an optimizer that is not used here
    try:
        import deepspeed.runtime.zero.muon.original_muon
    finally:
        compiler.compile = before
    return deepspeed


def _fill_shares(parameter: nn.Parameter, checkpoint: Checkpoint, name: str) -> None:
    """Copy this worker's share of a partitioned parameter's moments to its place: ZeRO-3 cuts each by itself."""
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

    for moment in MOMENTS:
        size = safe_get_local_optimizer_state(parameter, moment).numel()
        whole = checkpoint.moments[f"{name}.{moment}"].flatten()
        padded = nn.functional.pad(whole, (0, size * world_size() - whole.numel()))
        safe_set_local_optimizer_state(parameter, padded[rank() * size :][:size], moment)


def _fill_fragments(state: dict[str, Tensor], parameter: Any, checkpoint: Checkpoint, name: str) -> None:
    """Copy the part of a parameter's moments that lies in this worker's flat partition, if any, to its place there."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return
    whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    for moment in MOMENTS:
        part = checkpoint.moments[f"{name}.{moment}"].flatten().narrow(0, whole.start, whole.numel)
        state[moment].narrow(0, flat.start, flat.numel).copy_(part)
