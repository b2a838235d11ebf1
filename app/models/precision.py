"""The number format of matrix products on a device."""

from typing import Literal

import torch

from app.config.base import Precision

Resolved = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: Precision, device: torch.device) -> Resolved:
    """What `auto` means on this machine: bf16 where the hardware multiplies it.

    Elsewhere bf16 is emulated: on a CPU with AVX2 alone its matrix products take five times as long as fp32's.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last is ARM's
    return "bf16" if has_bf16 else "fp32"


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Of matrix products and attention."""
    return _DTYPES[resolve_precision(precision, device)]
