"""Rows of token ids -> padded tensors. One `Batch` is what one worker computes in one optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    """int64 [batch, time], padded on the right with 0."""
    loss_mask: Tensor
    """bool [batch, time]: whether predicting this token counts; never true on padding."""
    num_tokens: int
    """Tokens that are not padding."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.loss_mask.to(device), self.num_tokens)


def collate(input_ids: Sequence[np.ndarray], loss_masks: Sequence[np.ndarray]) -> Batch:
    """Pad records to the longest of them.

    Padding is known by position, never by a pad token's id: GPT-2 has none, and masking by the end-of-text id in
    its place would teach the model never to stop.
    """
    longest = max(len(ids) for ids in input_ids)
    ids = np.zeros((len(input_ids), longest), dtype=np.int64)
    mask = np.zeros((len(input_ids), longest), dtype=bool)
    for row, (record_ids, record_mask) in enumerate(zip(input_ids, loss_masks, strict=True)):
        ids[row, : len(record_ids)] = record_ids
        mask[row, : len(record_mask)] = record_mask
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), sum(map(len, input_ids)))
