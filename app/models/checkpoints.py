"""Model folders <-> `Decoder`: config.json and safetensors, one file or sharded.

A decoder of GPT-2's architecture is a Hugging Face GPT-2 folder, which `transformers` opens. GPT-2 stores its
projections as Conv1D, [in, out]; they become nn.Linear, [out, in], here and nowhere else. Any other architecture is a
folder of our own, `model_type: pacos`, with the decoder's settings and names. Pickled weights (pytorch_model.bin) are
refused: loading one can run code.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.errors import UserError
from app.foreign_json import read_json
from app.models.decoder import Decoder, DecoderConfig
from app.models.quantization import QuantizationConfig, prepare

OWN_TYPE = "pacos"
"""`model_type` of folders that hold another architecture than GPT-2's."""

MODEL_FILES = ("config.json", "model.safetensors")
"""What `save_decoder` writes."""
PROVENANCE_FILE = "pacos.json"
"""What a model folder that fine-tuning made says of itself: the template of its prompts, what was merged."""

_MOST_LAYERS, _LARGEST = 1000, 2**24
"""What a config.json may ask for: a layer takes memory before a weight is looked at, and no product may overflow."""

# ours -> GPT-2's, inside a block; True marks a Conv1D weight, which is stored transposed
_BLOCK_NAMES = {
    "attn_norm.weight": ("ln_1.weight", False),
    "attn_norm.bias": ("ln_1.bias", False),
    "attn.qkv.weight": ("attn.c_attn.weight", True),
    "attn.qkv.bias": ("attn.c_attn.bias", False),
    "attn.out.weight": ("attn.c_proj.weight", True),
    "attn.out.bias": ("attn.c_proj.bias", False),
    "mlp_norm.weight": ("ln_2.weight", False),
    "mlp_norm.bias": ("ln_2.bias", False),
    "mlp.up.weight": ("mlp.c_fc.weight", True),
    "mlp.up.bias": ("mlp.c_fc.bias", False),
    "mlp.down.weight": ("mlp.c_proj.weight", True),
    "mlp.down.bias": ("mlp.c_proj.bias", False),
}
_OUTER_NAMES = {
    "token_embedding.weight": "wte.weight",
    "position_embedding.weight": "wpe.weight",
    "final_norm.weight": "ln_f.weight",
    "final_norm.bias": "ln_f.bias",
}


def load_decoder(folder: Path, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model in `folder`, in evaluation mode.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing or has the wrong shape, or the architecture
            is not one that the decoder computes.
    """
    model = empty_decoder(folder)
    stored = _read_tensors(folder)
    is_ours = is_own_folder(folder)
    quantized = {name for name, _ in model.named_buffers()}
    weights: dict[str, Tensor] = {}
    for name, expected in model.state_dict().items():
        source, transposed = (name, False) if is_ours else _gpt2_name(name)
        tensor = stored.get(source, stored.get(f"transformer.{source}"))
        if tensor is None:
            raise UserError(f"{folder}: the weights lack {source!r}; copy the checkpoint again")
        if transposed:
            tensor = tensor.t()
        if tensor.shape != expected.shape:
            raise UserError(
                f"{folder}: {source!r} has shape {list(tensor.shape)} where config.json asks for {list(expected.shape)}"
            )
        # Copied in any case: what is mapped from the file would hold on to all of it.
        stored_as = expected.dtype if name in quantized else dtype
        weights[name] = torch.empty(tensor.shape, dtype=stored_as).copy_(tensor)
    head = stored.get("lm_head.weight")
    if head is not None and not torch.equal(head.to(dtype), weights["token_embedding.weight"]):
        raise UserError(f"{folder}: lm_head is not tied to the token embedding; untied heads are not supported")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def empty_decoder(folder: Path) -> Decoder:
    """The model in `folder` on the `meta` device: all of its shapes, and no memory."""
    values = _read_json(folder / "config.json")
    with torch.device("meta"):
        model = Decoder(_config_of(folder, values))
        if values.get("quantization") is not None:
            prepare(model, _quantization_of(folder, values))
    return model


def save_decoder(
    folder: Path,
    model: Decoder,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: QuantizationConfig | None = None,
) -> None:
    """Write config.json and model.safetensors into `folder`, which exists.

    `transformers` opens a model of GPT-2's architecture. `quantization` is how the model was quantized; quantized
    layers are stored as they are, all else in `dtype`.
    """
    is_gpt2 = is_gpt2_architecture(model.config) and quantization is None
    quantized = {name for name, _ in model.named_buffers()}
    stored = {}
    for name, tensor in model.state_dict().items():
        target, transposed = _gpt2_name(name) if is_gpt2 else (name, False)
        tensor = tensor if name in quantized else tensor.to(dtype)
        tensor = (tensor.t() if transposed else tensor).cpu().contiguous()
        stored[f"transformer.{target}" if is_gpt2 else target] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    values = _to_gpt2_config(model.config, dtype) if is_gpt2 else _to_own_config(model.config, dtype, quantization)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def is_gpt2_architecture(config: DecoderConfig) -> bool:
    """Whether `transformers`' GPT-2 computes the same."""
    # Of the settings that have a default, which is GPT-2's, these two are read another way.
    free = ("norm_epsilon", "num_kv_heads")
    kinds = [field for field in fields(DecoderConfig) if field.default is not MISSING and field.name not in free]
    return config.kv_heads == config.num_heads and all(getattr(config, kind.name) == kind.default for kind in kinds)


def read_config(folder: Path) -> DecoderConfig:
    """Architecture of the model in `folder`."""
    return _config_of(folder, _read_json(folder / "config.json"))


def _config_of(folder: Path, values: dict[str, Any]) -> DecoderConfig:
    readers: dict[Any, Callable[[Path, dict[str, Any]], DecoderConfig]] = {
        "gpt2": _from_gpt2_config,
        OWN_TYPE: _from_own_config,
    }
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in readers:
        raise UserError(f"{folder}/config.json: model_type={kind!r}; only 'gpt2' and {OWN_TYPE!r} can be loaded")
    config = readers[kind](folder, values)
    for name in ("vocab_size", "context_length", "num_layers", "num_heads", "width", "mlp_width", "kv_heads"):
        value, largest = getattr(config, name), _MOST_LAYERS if name == "num_layers" else _LARGEST
        if not isinstance(value, int) or not 1 <= value <= largest:
            raise UserError(f"{folder}/config.json: {name} is {value!r}; it must be from 1 to {largest}")
    if config.positions == "rotary" and config.head_width % 2:
        raise UserError(f"{folder}/config.json: rotary positions need heads of an even width, not {config.head_width}")
    if config.width % config.num_heads:
        raise UserError(f"{folder}/config.json: a width of {config.width} is no multiple of {config.num_heads} heads")
    if config.num_heads % config.kv_heads:
        raise UserError(f"{folder}/config.json: {config.num_heads} heads are no multiple of {config.kv_heads} KV heads")
    return config


def _from_gpt2_config(folder: Path, values: dict[str, Any]) -> DecoderConfig:
    _refuse_unsupported(folder, values)
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        context_length=values["n_positions"],
        num_layers=values["n_layer"],
        num_heads=values["n_head"],
        width=values["n_embd"],
        mlp_width=values.get("n_inner") or 4 * values["n_embd"],
        norm_epsilon=values.get("layer_norm_epsilon", 1e-5),
    )


def _from_own_config(folder: Path, values: dict[str, Any]) -> DecoderConfig:
    strange = sorted(set(values.get("architecture") or {}) - {field.name for field in fields(DecoderConfig)})
    if strange:
        raise UserError(
            f"{folder}/config.json: architecture.{strange[0]} is unknown to this version of pacos; update it"
        )
    return _validated(folder, values, "architecture", DecoderConfig)


def _quantization_of(folder: Path, values: dict[str, Any]) -> QuantizationConfig:
    return _validated(folder, values, "quantization", QuantizationConfig)


def _validated(folder: Path, values: dict[str, Any], key: str, kind: type[Any]) -> Any:
    try:
        return TypeAdapter(kind).validate_python(values.get(key))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (key, *first["loc"])))
        raise UserError(f"{folder}/config.json: {where}: {first['msg']}; copy the model again") from None


def weight_bytes(folder: Path) -> int:
    """Size of the weight files in `folder`."""
    return sum(file.stat().st_size for file in _weight_files(folder))


def stored_dtype(folder: Path) -> torch.dtype:
    """Of the token embedding in `folder`."""
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(("wte.weight", "token_embedding.weight")):
                    return stored.get_tensor(name).dtype
    raise UserError(f"{folder}: the weights lack a token embedding; copy the checkpoint again")


def is_own_folder(folder: Path) -> bool:
    """Whether `folder` is in our format, which `transformers` does not open."""
    return _read_json(folder / "config.json").get("model_type") == OWN_TYPE


def write_provenance(folder: Path, values: dict[str, Any]) -> None:
    (folder / PROVENANCE_FILE).write_text(json.dumps(values, indent=2) + "\n")


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `write_provenance` wrote; empty for a model that came from elsewhere."""
    return _read_json(folder / PROVENANCE_FILE) if (folder / PROVENANCE_FILE).exists() else {}


def weights_hash(folder: Path) -> str:
    """SHA-256 over the weight files of `folder`: what a delta records as its base.

    In a folder of our own the same weights may be computed with in several ways, so these count too.
    """
    values = _read_json(folder / "config.json")
    digest = hashlib.sha256()
    if values.get("model_type") == OWN_TYPE:
        digest.update(json.dumps([values.get("architecture"), values.get("quantization")], sort_keys=True).encode())
    for file in _weight_files(folder):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _gpt2_name(name: str) -> tuple[str, bool]:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name], False
    _, layer, inner = name.split(".", 2)
    stored, transposed = _BLOCK_NAMES[inner]
    return f"h.{layer}.{stored}", transposed


def _to_gpt2_config(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
        # by GPT-2's convention the last token of the vocabulary ends a text
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
    }


def _to_own_config(
    config: DecoderConfig, dtype: torch.dtype, quantization: QuantizationConfig | None
) -> dict[str, Any]:
    return {
        "model_type": OWN_TYPE,
        "architecture": asdict(config),
        "quantization": None if quantization is None else quantization.model_dump(mode="json"),
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": config.vocab_size - 1,
    }


def _refuse_unsupported(folder: Path, values: dict[str, Any]) -> None:
    needed = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
    missing = [key for key in needed if not isinstance(values.get(key), int)]
    if missing:
        raise UserError(f"{folder}/config.json lacks {', '.join(missing)}")
    expected = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
    }
    for key, allowed in expected.items():
        if values.get(key, allowed[0]) not in allowed:
            raise UserError(f"{folder}/config.json: {key}={values[key]!r} is not supported; only {allowed[0]!r} is")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stored:
                tensors.update({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or not a safetensors file ({error}); copy it again") from None
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    files = [folder / name for name in (_listed_files(index) if index.exists() else ["model.safetensors"])]
    missing = [file.name for file in files if not file.is_file()]
    if missing and (folder / "pytorch_model.bin").exists():
        raise UserError(
            f"{folder} holds pickled weights (pytorch_model.bin), which are not loaded because they can run code; "
            "save the model again with safe_serialization=True"
        )
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; a model folder holds config.json and model.safetensors")
    return files


def _listed_files(index: Path) -> list[str]:
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise UserError(f"{index}: weight_map must give each tensor's file; copy the checkpoint again")
    names = sorted(set(listed.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index}: {outside[0]!r} is no file of this folder, and no other is read")
    return names


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except FileNotFoundError:
        raise UserError(
            f"{file.parent} lacks {file.name}; a model folder holds config.json and model.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values
