"""The engine's Triton kernels, where there is a GPU for them. Importing this needs no Triton, using it does."""

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from app.engine.decoding import Decoding, row_counts
from app.engine.kv_cache import KVCache
from app.models.decoder import Decoder, DecoderConfig

if TYPE_CHECKING:
    from app.engine.kernels.paged_attention import PagedAttention

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16)
_WIDEST_HEAD = 256


def paged_attention_for(
    config: DecoderConfig,
    *,
    cache_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    max_rows: int,
) -> "PagedAttention | None":
    """Attention for steps of up to `max_rows` sequences, where its kernel can be had and knows such a model."""
    is_known = dtype in _DTYPES and cache_dtype in _DTYPES and config.head_width <= _WIDEST_HEAD
    if device.type != "cuda" or not is_known or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from app.engine.kernels.paged_attention import PagedAttention
    except ImportError as error:
        logger.warning("no Triton is here (%s): the engine computes attention with torch, which is slower", error)
        return None
    return PagedAttention(
        max_rows=row_counts(max_rows)[-1],
        num_heads=config.num_heads,
        head_width=config.head_width,
        device=device,
        overlaps=can_overlap(device),
    )


def decoding_for(
    model: Decoder, head: nn.Module, cache: KVCache, attention: "PagedAttention", *, max_rows: int, max_blocks: int
) -> Decoding:
    """Recorded steps of the base `model`."""
    from app.engine.decode_model import DecodeModel
    from app.engine.kernels.few_rows import FewRows

    step_model = DecodeModel(model, head, cache, attention, FewRows(overlaps=attention.overlaps))
    return Decoding(step_model, cache, max_rows=max_rows, max_blocks=max_blocks)


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may begin before the one in front of it has ended (programmatic dependent launch)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)
