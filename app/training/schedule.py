"""Learning rate by step."""

import math

from app.config.schema import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, *, total_steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up to the peak, then `config.schedule` from there to the last step."""
    peak, warmup_steps = config.learning_rate, math.ceil(total_steps * config.warmup_fraction)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
        "trapezoid": _trapezoid(step, total_steps, config.decay_fraction),
    }
    lowest = 0.0 if config.schedule == "constant" else config.final_fraction
    return peak * (lowest + (1 - lowest) * left[config.schedule])


def _trapezoid(step: int, total_steps: int, decay_fraction: float) -> float:
    """1, then in a line to 0 at the last step (Hägele et al. 2024, arXiv:2405.18392).

    How long a run goes on need not be known until the fall begins, and any step before it can be gone on from.
    """
    decay_steps = math.ceil(total_steps * decay_fraction)
    return min(1.0, (total_steps - 1 - step) / max(1, decay_steps))
