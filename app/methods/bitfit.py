"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models
(Ben Zaken, Ravfogel & Goldberg 2021, arXiv:2106.10199).

Only the biases train, those of the norms among them: a thousandth of the weights.
"""

from app.config.methods import BitFitConfig
from app.errors import UserError
from app.models.decoder import Decoder


def apply(model: Decoder, config: BitFitConfig) -> None:
    """Unfreeze the biases, in place.

    Raises:
        UserError: the model has none.
    """
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(".bias")]
    if not biases:
        raise UserError("method.type='bitfit' trains biases, and the model has none; choose another technique")
    for bias in biases:
        bias.requires_grad_(True)


def merge(model: Decoder) -> None:
    """Nothing to fold: the trained weights are the model's own."""
