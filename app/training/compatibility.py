"""Whether prepared data and a model belong together; checked before anything starts."""

from app.assets import model_folder
from app.config.methods import MethodConfig, prefix_length
from app.data.shards import Manifest
from app.data.tokenization import Tokenizer, load_tokenizer
from app.errors import UserError
from app.models.checkpoints import read_config


def check_fits(manifest: Manifest, *, data: str, model: str, method: MethodConfig | None = None) -> Tokenizer:
    """The model's tokenizer, if the shards were made with it and their records fit into the model's context, of which
    `method` may take a part.

    Raises:
        UserError: naming `data`, `model` and the remedy.
    """
    folder = model_folder(model)
    tokenizer, shape, prepared = load_tokenizer(folder), read_config(folder), manifest.values["config"]
    if manifest.values["tokenizer_hash"] != tokenizer.fingerprint():
        raise UserError(
            f"data={data!r} was prepared with the tokenizer of model={prepared['model']!r}, which differs from that "
            f"of model={model!r}; run `pacos prepare model={model}`"
        )
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"model={model!r}: its tokenizer has {tokenizer.vocab_size} entries and its weights {shape.vocab_size}; "
            "their files do not belong together"
        )
    # Of a packed row it is the documents that count: each has positions of its own.
    for key, longest in (("max_length", manifest.max_length), ("layout.length", manifest.fixed_length or 0)):
        room = shape.context_length - prefix_length(method)
        if longest > room:
            prefix = f", {prefix_length(method)} of them the method's" if prefix_length(method) else ""
            raise UserError(
                f"data={data!r} was prepared with {key}={longest} tokens and model={model!r} reads "
                f"{shape.context_length}{prefix}; prepare with {key}={room}"
            )
    return tokenizer
