"""Full fine-tuning: every weight trains. The yardstick that the other techniques are measured by."""

from app.config.methods import FullConfig
from app.models.decoder import Decoder


def apply(model: Decoder, config: FullConfig) -> None:
    """Unfreeze everything, in place."""
    model.requires_grad_(True)


def merge(model: Decoder) -> None:
    """Nothing to fold: the trained weights are the model's own."""
