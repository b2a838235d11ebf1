"""Clamped ReLU, min(max(x, 0), limit)."""

from torch import Tensor

LIMIT = 6.0


def clamped_relu(x: Tensor, *, limit: float = LIMIT) -> Tensor:
    """min(max(x, 0), limit), elementwise."""
    return x.clamp(0.0, limit)
