"""A delta: what fine-tuning changed, and nothing else.

A folder with `delta.safetensors`, the trained weights, and `delta.json`: technique, base model and its hash,
tokenizer, template, metrics. The hash of the weights and the technique is the delta's identity everywhere.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.config.methods import ExtraBlockConfig, MethodConfig, PrefixConfig, parts_of
from app.errors import UserError
from app.foreign_json import read_json
from app.methods import apply_method, check_mergeable, fold_method, merge_method
from app.models.decoder import Decoder

_WEIGHTS, _METADATA = DELTA_FILES = ("delta.safetensors", "delta.json")


@dataclass(frozen=True)
class Delta:
    method: MethodConfig
    weights: dict[str, Tensor]
    metadata: dict[str, Any]
    """Where it came from: `base`, `base_hash`, `tokenizer_hash`, `template`, `config`, `metrics`."""

    @property
    def hash(self) -> str:
        """SHA-256 of technique, base and weights: equal deltas answer equally."""
        digest = hashlib.sha256(self.method.model_dump_json().encode())
        digest.update(str(self.metadata.get("base_hash")).encode())
        for name in sorted(self.weights):
            digest.update(name.encode())
            digest.update(self.weights[name].float().contiguous().numpy().tobytes())
        return digest.hexdigest()


def write_delta(folder: Path, delta: Delta) -> None:
    """Fill `folder`, which exists. Whoever calls this makes the folder appear as a whole."""
    save_file(delta.weights, folder / _WEIGHTS)
    metadata = {"method": delta.method.model_dump(mode="json"), **delta.metadata}
    (folder / _METADATA).write_text(json.dumps(metadata, indent=2) + "\n")


def read_delta(folder: Path) -> Delta:
    """The delta in `folder`.

    Raises:
        UserError: the folder is not a delta, or a file is missing or damaged.
    """
    for name in (_METADATA, _WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"delta={str(folder)!r} lacks {name}; a delta is the `delta` folder of a training run")
    try:
        metadata = read_json(folder / _METADATA)
        method: MethodConfig = TypeAdapter(MethodConfig).validate_python(metadata.pop("method"))
        weights = load_file(folder / _WEIGHTS)
    except (ValueError, KeyError, AttributeError, TypeError, ValidationError, SafetensorError) as error:
        raise UserError(f"delta={str(folder)!r} is damaged ({error}); copy it again") from None
    kinds = {"metrics": dict, "base": str, "base_hash": str, "tokenizer_hash": str}
    strange = [key for key, kind in kinds.items() if not isinstance(metadata.get(key, kind()), kind)]
    if strange:
        raise UserError(f"delta={str(folder)!r} is damaged: {strange[0]}={metadata[strange[0]]!r}; copy it again")
    if not isinstance(metadata.get("template", {}), dict):
        raise UserError(f"delta={str(folder)!r} was made by another version of pacos; train it again")
    return Delta(method, weights, metadata)


def apply_delta(model: Decoder, delta: Delta) -> None:
    """Put the technique and its trained weights into `model`, in place.

    Raises:
        UserError: the delta was trained on a model of another shape, or holds weights that are no numbers.
    """
    check_extent(model, delta)
    apply_method(model, delta.method)
    load_trained(model, delta.weights)


def fold_delta(model: Decoder, delta: Delta) -> None:
    """`apply_delta`, then fold into plain weights what can be: what computes the delta's answers in the least time."""
    apply_delta(model, delta)
    fold_method(model, delta.method)


def merge_delta(model: Decoder, delta: Delta) -> None:
    """`apply_delta`, then fold the technique into plain weights, in place.

    Raises:
        UserError: as `apply_delta`, or no plain weights compute the same.
    """
    check_mergeable(delta.method)
    apply_delta(model, delta)
    merge_method(model, delta.method)


def check_extent(model: Decoder, delta: Delta) -> None:
    """Refuse a delta whose settings ask for more room than its weights fill, before the room is taken: ten bytes of
    JSON can ask for any amount. Other settings than these cannot ask for more than the model has.

    Raises:
        UserError: naming the setting.
    """
    stored, width = sum(tensor.numel() for tensor in delta.weights.values()), model.config.width
    for part in parts_of(delta.method):
        if isinstance(part, ExtraBlockConfig):  # a block has a projection of width x width, and more
            name, weights = "count", part.count * width * width
        elif isinstance(part, PrefixConfig) and part.mlp_width is not None:
            name, weights = "mlp_width", part.mlp_width * width
        else:
            continue
        if weights > stored:
            raise UserError(
                f"the delta does not fit this model: {part.type}.{name}={getattr(part, name)} would make more than "
                f"{weights} weights, and the delta holds {stored}"
            )


def check_base(delta: Delta, folder: str, *, base_hash: str, tokenizer_hash: str) -> None:
    """Refuse a delta that was trained on another base or tokenizer than it would be used with.

    Raises:
        UserError: naming `folder` and what differs.
    """
    expected = {"base_hash": base_hash, "tokenizer_hash": tokenizer_hash}
    for key, value in expected.items():
        recorded = delta.metadata.get(key, "")
        if recorded != value:
            raise UserError(
                f"delta={folder!r} does not belong to the model: it was trained with {key}={recorded[:16]!r} and not "
                f"{value[:16]!r}, on the base {delta.metadata.get('base')!r}"
            )


@torch.no_grad()
def load_trained(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the trainable parameters of the same names; the two must match exactly.

    Raises:
        UserError: they do not, or not all of them are numbers.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted(trained.keys() ^ weights.keys())
    wrong += [name for name in trained.keys() & weights.keys() if trained[name].shape != weights[name].shape]
    if wrong:
        raise UserError(f"the delta does not fit this model: {wrong[0]} differs; was it trained on another base?")
    strange = next((name for name in trained if not weights[name].isfinite().all()), None)
    if strange is not None:
        raise UserError(f"the delta's {strange} holds NaN or infinite weights; train it again")
    for name, parameter in trained.items():
        parameter.copy_(weights[name])
