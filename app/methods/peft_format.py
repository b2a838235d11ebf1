"""Deltas <-> adapters of the `peft` library: adapter_config.json and adapter_model.safetensors.

LoRA with its variants, prefix and prompt tuning, over GPT-2 models. `peft` keeps A [rank, in] and B [out, rank] for
GPT-2's transposed Conv1D too, so LoRA's factors are the same tensors under other names.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.config.methods import LoraConfig, MethodConfig, PrefixConfig, PromptConfig, name_of
from app.errors import UserError
from app.foreign_json import read_json
from app.methods.delta import Delta
from app.models.checkpoints import is_gpt2_architecture
from app.models.decoder import DecoderConfig

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")

_LAYERS = {"attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
_TENSORS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_PROMPT = "prompt_embeddings"

_CHANGES_THE_RESULT = (
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
)
"""Settings of `peft` that a LoRA here does not have; each must be off."""


def write_peft(folder: Path, delta: Delta, *, shape: DecoderConfig, base_folder: Path) -> None:
    """Fill `folder`, which exists, with what `PeftModel.from_pretrained` reads; `shape` is the base's.

    Raises:
        UserError: `peft` has no such technique, or `transformers` no such base.
    """
    if not is_gpt2_architecture(shape):
        raise UserError(f"the base {delta.metadata.get('base')!r} is no GPT-2; peft wraps models of transformers only")
    config, tensors = _to_peft(delta, shape)
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": str(base_folder)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / PEFT_FILES[1])
    (folder / PEFT_FILES[0]).write_text(json.dumps(config, indent=2) + "\n")


def read_peft(folder: Path, *, shape: DecoderConfig, metadata: dict[str, Any]) -> Delta:
    """The adapter in `folder` as a delta with `metadata`, over a base of `shape`.

    Raises:
        UserError: the folder is not one of `peft`, or holds what has no equal here.
    """
    if not is_gpt2_architecture(shape):
        raise UserError(f"model={metadata.get('base')!r} is no GPT-2; adapters of peft are read over GPT-2 models only")
    for name in PEFT_FILES:
        if not (folder / name).is_file():
            raise UserError(f"source={str(folder)!r} lacks {name}; save the adapter with peft's save_pretrained")
    try:
        config = read_json(folder / PEFT_FILES[0])
        stored = load_file(folder / PEFT_FILES[1])
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"source={str(folder)!r} is damaged ({error}); copy it again") from None
    readers = {"LORA": _read_lora, "PREFIX_TUNING": _read_prefix, "PROMPT_TUNING": _read_prompt}
    if not isinstance(kind, str) or kind not in readers:
        raise UserError(f"source={str(folder)!r} holds {kind!r}; can be read: {', '.join(readers)}")
    try:
        method, weights = readers[kind](config, stored, shape)
    except (KeyError, IndexError, TypeError, RuntimeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"source={str(folder)!r} does not fit model={metadata.get('base')!r}: {reason}") from None
    return Delta(method, weights, metadata)


def _to_peft(delta: Delta, shape: DecoderConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    method, weights = delta.method, delta.weights
    if isinstance(method, LoraConfig):
        config = {
            "peft_type": "LORA",
            "r": method.rank,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "target_modules": sorted({_peft_layer(name) for name in weights}),
            "fan_in_fan_out": True,  # Conv1D
            "use_rslora": method.rank_stabilized,
            "use_dora": method.dora,
            "bias": "none",
        }
        return config, {_peft_name(name): tensor for name, tensor in weights.items()}
    if isinstance(method, PrefixConfig) and method.mlp_width is None:
        pairs = torch.stack([weights["prefix.keys"], weights["prefix.values"]], dim=1)
        # [layers, 2, heads, length, head_width] -> [length, layers · 2 · width]
        flat = pairs.permute(3, 0, 1, 2, 4).reshape(method.length, -1)
        config = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "encoder_hidden_size": shape.width}
        return {**config, **_virtual_tokens(method.length, shape)}, {_PROMPT: flat}
    if isinstance(method, PromptConfig):
        config = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
        return {**config, **_virtual_tokens(method.length, shape)}, {_PROMPT: weights["prefix.embeddings"]}
    raise UserError(f"a delta of {name_of(method)} cannot be exported: peft has lora, prefix and prompt alone")


def _virtual_tokens(length: int, shape: DecoderConfig) -> dict[str, Any]:
    return {
        "num_virtual_tokens": length,
        "token_dim": shape.width,
        "num_attention_heads": shape.num_heads,
        "num_layers": shape.num_layers,
        "num_transformer_submodules": 1,
    }


def _peft_layer(name: str) -> str:
    """`attn.c_attn` of `blocks.0.attn.qkv.lora_a`."""
    return _LAYERS[".".join(name.split(".")[2:4])]


def _peft_name(name: str) -> str:
    layer, tensor = name.split(".")[1], name.rpartition(".")[2]
    return f"base_model.model.transformer.h.{layer}.{_peft_layer(name)}.{_TENSORS[tensor]}"


def _read_lora(
    config: dict[str, Any], stored: dict[str, Tensor], shape: DecoderConfig
) -> tuple[MethodConfig, dict[str, Tensor]]:
    strange = [key for key in _CHANGES_THE_RESULT if config.get(key)]
    if config.get("bias", "none") != "none":
        strange.append("bias")
    if isinstance(config.get("init_lora_weights"), str) and config["init_lora_weights"] not in ("gaussian", "eva"):
        strange.append("init_lora_weights")  # pissa and its like change the base
    if strange:
        raise UserError(f"peft's setting {strange[0]}={config.get(strange[0])!r} has no equal here")
    ours = [f"blocks.{n}.{layer}.{tensor}" for n in range(shape.num_layers) for layer in _LAYERS for tensor in _TENSORS]
    names = {_peft_name(name): name for name in ours}
    weights = {names[name]: tensor.float() for name, tensor in stored.items()}
    targets = tuple(layer for layer in _LAYERS if any(f".{layer}.lora_a" in name for name in weights))
    method = LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=targets,
        rank_stabilized=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
    )
    return method, weights


def _read_prefix(
    config: dict[str, Any], stored: dict[str, Tensor], shape: DecoderConfig
) -> tuple[MethodConfig, dict[str, Tensor]]:
    # peft saves what its MLP makes, where it has one, so the MLP is gone here too
    flat = stored[_PROMPT].float()
    length = flat.shape[0]
    pairs = flat.view(length, shape.num_layers, 2, shape.num_heads, shape.head_width).permute(2, 1, 3, 0, 4)
    keys, values = pairs.contiguous()
    return PrefixConfig(length=length), {"prefix.keys": keys, "prefix.values": values}


def _read_prompt(
    config: dict[str, Any], stored: dict[str, Tensor], shape: DecoderConfig
) -> tuple[MethodConfig, dict[str, Tensor]]:
    embeddings = stored[_PROMPT].float()
    if embeddings.shape[1] != shape.width:
        raise UserError(f"the prompt's embeddings have width {embeddings.shape[1]} and the model has {shape.width}")
    return PromptConfig(length=embeddings.shape[0]), {"prefix.embeddings": embeddings}
