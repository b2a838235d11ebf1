"""Full fine-tuning: every weight trains. The yardstick that the other techniques are measured by."""

from torch import nn

from app.config.schema import FullConfig


def apply(model: nn.Module, config: FullConfig) -> None:
    model.requires_grad_(True)


def merge(model: nn.Module) -> None:
    """Nothing to fold: the trained weights are the model's own."""
