"""Learning rate by step."""

import math

from app.config.schema import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, *, total_steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up to the peak, then `config.schedule` from there to the last step."""
    peak, warmup_steps = config.learning_rate, math.ceil(total_steps * config.warmup_fraction)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    lowest = 0.0 if config.schedule == "constant" else config.final_fraction
    return peak * (lowest + (1 - lowest) * left[config.schedule])
