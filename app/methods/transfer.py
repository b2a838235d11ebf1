"""Deltas as folders: list them, merge one into a plain model, exchange with `peft`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from app.assets import model_folder
from app.atomic import check_apart, check_replaceable, replaced_folder, told_if_full
from app.config.methods import name_of
from app.config.transfer import ExportConfig, ImportConfig, MergeConfig
from app.data.prompts import PacosTemplate
from app.data.tokenization import TOKENIZER_FILES, copy_tokenizer, load_tokenizer
from app.errors import UserError
from app.methods import check_mergeable, merge_method
from app.methods.delta import DELTA_FILES, Delta, apply_delta, check_base, read_delta, write_delta
from app.methods.peft_format import PEFT_FILES, read_peft, write_peft
from app.models.checkpoints import (
    MODEL_FILES,
    PROVENANCE_FILE,
    is_own_folder,
    load_decoder,
    read_config,
    read_provenance,
    save_decoder,
    weights_hash,
    write_provenance,
)
from app.models.decoder import Decoder
from app.models.quantization import dequantize


@dataclass(frozen=True)
class Listed:
    """A delta that was found, or why what looks like one cannot be read."""

    folder: Path
    delta: Delta | None = None
    problem: str = ""
    size_bytes: int = 0


@dataclass(frozen=True)
class Merged:
    output: Path
    parameters: int
    largest_logit: float
    largest_difference: float
    """Between the logits before and after merging, over random texts."""


def find_deltas(folder: Path) -> Iterator[Listed]:
    """All deltas below `folder`, by path, one at a time: together their weights may be large.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no folder; name one that holds training runs")
    files = sorted(folder.rglob(DELTA_FILES[1]))
    # what begins with a dot is being written, or was when its process died
    yield from (_listed(file.parent) for file in files if not file.parent.name.startswith("."))


def merge(config: MergeConfig) -> Merged:
    """Fold the delta into its base, in fp32, and write the result as a model folder, in one rename.

    Raises:
        UserError: the technique has no equal in plain weights, or the delta belongs to another base.
    """
    delta = read_delta(Path(config.delta))
    check_mergeable(delta.method)
    folder = _base_folder(config.model, delta, config.delta)
    output, contents = Path(config.output), (*MODEL_FILES, *TOKENIZER_FILES, PROVENANCE_FILE)
    check_apart(output, folder, Path(config.delta))
    check_replaceable(output, contents)
    model = load_decoder(folder)
    apply_delta(model, delta)
    model.requires_grad_(False).eval()
    before = _probe(model)
    merge_method(model, delta.method)
    dequantize(model)
    after = _probe(model)
    with told_if_full(output), replaced_folder(output, contents=contents) as staging:
        save_decoder(staging, model)
        copy_tokenizer(folder, staging)
        origin = {"merged_delta": delta.hash}
        template = delta.metadata.get("template")
        write_provenance(staging, {**read_provenance(folder), **origin, **({"template": template} if template else {})})
    return Merged(
        output,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        largest_logit=before.abs().max().item(),
        largest_difference=(after - before).abs().max().item(),
    )


def export(config: ExportConfig) -> None:
    """Write the delta as an adapter of `peft`, in one rename.

    Raises:
        UserError: `peft` has no such technique, or the delta belongs to another base.
    """
    delta = read_delta(Path(config.delta))
    folder = _base_folder(config.model, delta, config.delta)
    check_apart(Path(config.output), folder, Path(config.delta))
    if is_own_folder(folder):
        raise UserError(f"the base {str(folder)!r} is in our own format; peft wraps models that transformers opens")
    output = Path(config.output)
    with told_if_full(output), replaced_folder(output, contents=PEFT_FILES) as staging:
        write_peft(staging, delta, shape=read_config(folder), base_folder=folder)


def import_adapter(config: ImportConfig) -> Delta:
    """Read an adapter of `peft` and write it as a delta over `config.model`, in one rename.

    Raises:
        UserError: the folder is not one of `peft`, or does not fit the model.
    """
    folder = model_folder(config.model)
    check_apart(Path(config.output), folder, Path(config.source))
    metadata = {
        "base": config.model,
        "base_hash": weights_hash(folder),
        "tokenizer_hash": load_tokenizer(folder).fingerprint(),
        "template": read_provenance(folder).get("template") or PacosTemplate().to_json(),
        "imported_from": config.source,
    }
    delta = read_peft(Path(config.source), shape=read_config(folder), metadata=metadata)
    apply_delta(load_decoder(folder), delta)  # whether it fits
    output = Path(config.output)
    with told_if_full(output), replaced_folder(output, contents=DELTA_FILES) as staging:
        write_delta(staging, delta)
    return delta


def summary(listed: Listed) -> dict[str, object]:
    """One line of the list."""
    if listed.delta is None:
        return {"folder": listed.folder, "problem": listed.problem}
    delta = listed.delta
    return {
        "folder": listed.folder,
        "method": name_of(delta.method),
        "base": delta.metadata.get("base"),
        "parameters": sum(tensor.numel() for tensor in delta.weights.values()),
        "size_bytes": listed.size_bytes,
        "eval_loss": delta.metadata.get("metrics", {}).get("eval_loss"),
        "hash": delta.hash,
    }


def _listed(folder: Path) -> Listed:
    try:
        size = sum((folder / name).stat().st_size for name in DELTA_FILES)
        return Listed(folder, read_delta(folder), size_bytes=size)
    except (UserError, OSError) as error:
        return Listed(folder, problem=str(error))


def _base_folder(model: str | None, delta: Delta, name: str) -> Path:
    """The folder of the delta's base, checked to be that."""
    base = model or delta.metadata.get("base")
    if base is None:
        raise UserError(f"delta={name!r} does not say which base it belongs to; pass model=…")
    folder = model_folder(base)
    check_base(delta, name, base_hash=weights_hash(folder), tokenizer_hash=load_tokenizer(folder).fingerprint())
    return folder


@torch.no_grad()
def _probe(model: Decoder) -> Tensor:
    """Logits over four random texts, the same each time."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (4, min(64, model.max_length)), generator=draw)
    return model.head(model(ids))
