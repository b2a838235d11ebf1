"""In which number format matrix products are computed. Trained weights and optimizer state are fp32 in any."""

from typing import Literal

import torch

from app.config.base import Precision


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
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


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    is_bf16 = resolve_precision(precision, device) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16)
