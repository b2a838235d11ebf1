"""GPT-2's linear layers in int8, as vLLM takes them: a model's folder in the format of `compressed-tensors`.

Runs in vLLM's own environment, so it imports nothing of Pacos.
"""

import json
import shutil
from pathlib import Path

QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token",
                                  "dynamic": True},
        }
    },
}  # fmt: skip
"""Weights with a step for each output, activations with one for each token, found as they come."""


def int8_of(model: Path) -> Path:
    """The folder beside `model` with the same in int8; made if need be."""
    folder = model.parent / "vllm-int8-model"
    made = folder / "model.safetensors"
    if made.exists() and made.stat().st_mtime >= (model / "model.safetensors").stat().st_mtime:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(model, unfinished, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text())
    (unfinished / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    write_int8(model / "model.safetensors", unfinished / "model.safetensors")
    return unfinished.rename(folder)


def write_int8(source: Path, file: Path) -> None:
    """Matrices of linear layers rounded by a step for each output; what else there is, as it is."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, weights in load_file(source).items():
        if ".c_" in name and weights.ndim == 2:  # Conv1D: [in, out], which vLLM turns when it reads it
            step = weights.abs().amax(dim=0, keepdim=True).clamp_min(1e-12) / 127
            tensors[name] = (weights / step).round().to(torch.int8)
            tensors[f"{name}_scale"] = step.T.contiguous()  # [out, 1]
        else:
            tensors[name] = weights
    save_file(tensors, file, metadata={"format": "pt"})
