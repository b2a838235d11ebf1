"""Fine-tuning techniques, one file each. A technique is a config, `apply(model)`, and the weights that it trains.

Each module has `apply(model, config)`, which freezes what the technique does not train, and `merge(model)`, which
folds the technique into plain weights. `delta.py` saves and loads what was trained.
"""

from typing import Any

from torch import nn

from app.config.schema import MethodConfig
from app.methods import full, lora

_MODULES: dict[str, Any] = {"lora": lora, "full": full}


def apply_method(model: nn.Module, method: MethodConfig) -> None:
    """Make `model` trainable by `method`, in place."""
    _MODULES[method.type].apply(model, method)


def merge_method(model: nn.Module, method: MethodConfig) -> None:
    """Undo `apply_method`'s wrapping, keeping its effect, in place."""
    _MODULES[method.type].merge(model)
