"""What a quantized checkpoint records in its config.json, to build the same layers again."""

from typing import Annotated, Literal

from pydantic import Field

from app.config.base import Config

Scheme = Literal["int8_dynamic", "int8_static", "int8_weight", "nf4"]


class QuantizationConfig(Config):
    """Which layers are quantized, and how."""

    scheme: Scheme
    """int8_dynamic: activations get their scale per token, as they come; int8_static: from calibration; int8_weight:
    they stay floats; nf4: so do they, over weights of 4 bits."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    """Linear layers of each block, by the end of their name."""
