"""The model that continued pretraining goes on from: its shape becomes the configuration's. Knows no data."""

from app.assets import model_folder
from app.config.schema import PretrainConfig
from app.errors import UserError
from app.models.checkpoints import empty_decoder

_SHAPE = (
    "vocab_size",
    "context_length",
    "num_layers",
    "num_heads",
    "width",
    "mlp_width",
    "norm",
    "positions",
    "activation",
    "num_kv_heads",
)
"""Settings of `PretrainConfig` that a model brings along, by the names that `DecoderConfig` has for them too."""


def with_shape_of_initial(config: PretrainConfig) -> PretrainConfig:
    """`config` with the shape of its initial model, or as it is where it has none.

    Raises:
        UserError: the model cannot be read, its weights are quantized, or a setting that was given is not the model's.
    """
    if config.initial_model is None:
        return config
    model = empty_decoder(model_folder(config.initial_model))
    if next(model.buffers(), None) is not None:
        raise UserError(
            f"initial_model={config.initial_model!r} is quantized, and such weights cannot be trained; name the model "
            "that it was made of"
        )
    shape = model.config
    for name in config.model_fields_set & set(_SHAPE):
        theirs, ours = getattr(shape, name), getattr(config, name)
        if ours != theirs and ours is not None:
            raise UserError(
                f"{name}={ours!r}, but initial_model={config.initial_model!r} has {theirs!r}; leave {name} out"
            )
    return config.model_copy(update={name: getattr(shape, name) for name in _SHAPE})
