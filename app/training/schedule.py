"""Learning rate by step."""

import math


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_fraction: float) -> float:
    """Rate of step `step` (from 0): linear warm-up to `peak`, then cosine decay to a tenth of it."""
    warmup_steps = math.ceil(total_steps * warmup_fraction)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
