"""In which number format matrix products are computed. Trained weights and optimizer state are fp32 in any."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from app.config.base import Precision
from app.models.precision import compute_dtype


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    dtype = compute_dtype(precision, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def store_frozen(model: nn.Module, precision: Precision, device: torch.device) -> None:
    """Store the frozen linear layers of `model` in the format that autocast would round them to on `device` at every
    step, in place: half the memory, no copies, the same products."""
    dtype = compute_dtype(precision, device)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for parameter in (module.weight, module.bias):
                if parameter is not None and not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


LEFT_OUT = "steps_left_out"
"""Of a run's metrics: how many of its steps changed no weight, as their gradients overflowed."""


class LossScale:
    """The factor by which an fp16 loss is multiplied, and its gradients divided after the backward pass: else small
    ones would round to zero (Micikevicius et al. 2018, arXiv:1710.03740).

    It is doubled after `GROWTH_STEPS` steps without an overflow, and halved at one, whose step is left out.
    """

    START, GROWTH_STEPS = 2.0**16, 2000

    def __init__(self, value: float = START, *, steps: int = 0, left_out: int = 0) -> None:
        self.value = value
        self._steps = steps
        self._left_out = left_out

    @classmethod
    def after(cls, metrics: Mapping[str, Any]) -> "LossScale":
        """As it was after the step whose metrics have what `state` told; a new one where they have nothing."""
        return cls(
            metrics.get("next_loss_scale", cls.START),
            steps=int(metrics.get("steps_at_loss_scale", 0)),
            left_out=int(metrics.get(LEFT_OUT, 0)),
        )

    def state(self) -> dict[str, float]:
        return {"next_loss_scale": self.value, "steps_at_loss_scale": self._steps, LEFT_OUT: self._left_out}

    def update(self, *, is_finite: bool) -> None:
        """After a step; `is_finite`: its gradients were.

        Raises:
            FloatingPointError: they overflow without any factor too.
        """
        self._steps = self._steps + 1 if is_finite else 0
        if not is_finite:
            self._left_out += 1
            self.value /= 2
            if self.value < 1:
                raise FloatingPointError("the gradients overflow in fp16; use precision=bf16 or fp32")
        elif self._steps % self.GROWTH_STEPS == 0:
            self.value *= 2
