"""Fine-tuning techniques, one file each. A technique is a config, `apply(model)`, and the weights that it trains.

Each module has `apply(model, config)`, which adds what the technique trains to a model whose weights are frozen. Where
plain weights can have the same effect it has `merge(model)`, which folds the technique into them; where they cannot,
`NO_MERGE` says why. `delta.py` saves and loads what was trained, `peft_format.py` exchanges it with the `peft` library.
"""

from typing import Any

from app.config.methods import MethodConfig, PrefixConfig, SingleMethod, parts_of
from app.errors import UserError
from app.methods import adapter, bitfit, extra_block, freeze, full, lora, prefix, prompt
from app.models.decoder import Decoder
from app.models.quantization import QuantizedLinear

# In the order in which they are applied: those that choose among the model's weights first, then those that add to
# it, so that LoRA finds the extra block, and leaves alone what trains anyway; an adapter stands around a LoRA.
_MODULES: dict[str, Any] = {
    "full": full,
    "freeze": freeze,
    "bitfit": bitfit,
    "extra_block": extra_block,
    "lora": lora,
    "adapter": adapter,
    "prefix": prefix,
    "prompt": prompt,
}


def apply_method(model: Decoder, method: MethodConfig) -> None:
    """Make `model` trainable by `method`, in place.

    Raises:
        UserError: the technique does not fit the model.
    """
    model.requires_grad_(False)
    _check_quantization(model, method)
    for part in _ordered(method):
        _MODULES[part.type].apply(model, part)


def _check_quantization(model: Decoder, method: MethodConfig) -> None:
    """A rounded weight cannot take a gradient's small steps."""
    if not _is_quantized(model):
        return
    for part in parts_of(method):
        if part.type in ("full", "freeze", "bitfit"):
            raise UserError(
                f"method.type={part.type!r} trains the model's own weights, which are quantized here; train the model "
                "in full precision, or choose lora, adapter, prefix, prompt or extra_block"
            )


def merge_method(model: Decoder, method: MethodConfig) -> None:
    """Undo `apply_method`'s wrapping, keeping its effect, in place: a plain model is left.

    Raises:
        UserError: no plain model has that effect.
    """
    check_mergeable(method)
    _merge_parts(model, method)


def fold_method(model: Decoder, method: MethodConfig) -> None:
    """`merge_method` for those parts of `method` that can be merged without loss; the others stay as they are.

    A quantized model is left so: merging would take the memory that quantization saved.
    """
    if not _is_quantized(model):
        _merge_parts(model, method)


def _merge_parts(model: Decoder, method: MethodConfig) -> None:
    for part in reversed(_ordered(method)):
        if hasattr(_MODULES[part.type], "merge"):
            _MODULES[part.type].merge(model)


def _is_quantized(model: Decoder) -> bool:
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def check_mergeable(method: MethodConfig) -> None:
    """
    Raises:
        UserError: a part of `method` has no equal in plain weights; says why.
    """
    for part in parts_of(method):
        if not hasattr(_MODULES[part.type], "merge"):
            raise UserError(f"method.type={part.type!r} cannot be merged: {_MODULES[part.type].NO_MERGE}")


def without_training_parts(model: Decoder, method: MethodConfig) -> MethodConfig:
    """Drop from `model`, in place, what only training needs; returns the method that is left."""
    parts = [prefix.without_mlp(model, part) if isinstance(part, PrefixConfig) else part for part in parts_of(method)]
    return method.model_copy(update={"parts": tuple(parts)}) if method.type == "composed" else parts[0]


def _ordered(method: MethodConfig) -> list[SingleMethod]:
    order = list(_MODULES)
    return sorted(parts_of(method), key=lambda part: order.index(part.type))
