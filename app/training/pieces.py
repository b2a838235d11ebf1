"""A batch's rows end to end, in place of padded ones: what runs that share a base are computed in."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from app.data.batches import Batch
from app.models.attention import document_lengths

_FILLED_TO = 32
"""Pieces are filled to a multiple of this, by a document that is in no loss: for each size of a product oneDNN makes a
program, in milliseconds, and keeps the last 1,024, of some 300 KB each."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a batch, end to end, without what stands behind a row's last label: that influences no loss."""

    ids: Tensor
    """int64 [time]"""
    positions: Tensor
    """int64 [time]: where in its document each stands."""
    lengths: tuple[int, ...]
    """Of the documents, and of what fills up."""
    predicting: Tensor
    """int64 [labels]: the places of `ids` whose next token is in the loss."""
    labels: Tensor
    """int64 [labels]"""

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


def pieces_of(batch: Batch, *, most_tokens: int) -> list[Piece]:
    """The rows of `batch` in pieces of at most `most_tokens` before they are filled, or of one row that is longer."""
    in_loss = batch.loss_mask.clone()
    in_loss[:, 0] = False  # the first token of a row is predicted by nothing
    time = torch.arange(in_loss.shape[1])
    ends = torch.where(in_loss.any(1), in_loss.shape[1] - in_loss.flip(1).int().argmax(1), 0)
    pieces, first = [], 0
    while first < len(ends):
        last = first + 1
        while last < len(ends) and int(ends[first : last + 1].sum()) <= most_tokens:
            last += 1
        rows = slice(first, last)
        kept = time < ends[rows].unsqueeze(1)  # [rows, time]
        if kept.any():
            pieces.append(_piece(batch, rows, kept, in_loss[rows]))
        first = last
    return pieces


def _piece(batch: Batch, rows: slice, kept: Tensor, in_loss: Tensor) -> Piece:
    ids = batch.input_ids[rows][kept]
    places = torch.arange(kept.shape[1]).expand(kept.shape) if batch.positions is None else batch.positions[rows]
    numbers = torch.zeros_like(batch.input_ids[rows]) if batch.documents is None else batch.documents[rows]
    numbers = numbers + torch.arange(len(numbers)).unsqueeze(1) * (int(numbers.max()) + 1)
    labelled = in_loss[kept].nonzero().squeeze(1)
    filling = -len(ids) % _FILLED_TO
    return Piece(
        F.pad(ids, (0, filling)),
        positions=F.pad(places[kept], (0, filling)),
        lengths=(*document_lengths(numbers[kept].unsqueeze(0)), *([filling] if filling else [])),
        predicting=labelled - 1,
        labels=ids[labelled],
    )
