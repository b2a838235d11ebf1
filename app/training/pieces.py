"""A batch's rows end to end, in place of padded ones: what runs that share a base are computed in."""

from dataclasses import dataclass

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
    ends, pieces, first = batch.ends(), [], 0
    while first < len(ends):
        last = first + 1
        while last < len(ends) and int(ends[first : last + 1].sum()) <= most_tokens:
            last += 1
        if ends[first:last].any():
            pieces.append(_piece(batch.rows(slice(first, last)).end_to_end(multiple=_FILLED_TO)))
        first = last
    return pieces


def _piece(row: Batch) -> Piece:
    """Of a batch of one."""
    assert row.positions is not None and row.documents is not None
    labelled = row.loss_mask[0].nonzero().squeeze(1)
    return Piece(
        row.input_ids[0],
        positions=row.positions[0],
        lengths=tuple(document_lengths(row.documents)),
        predicting=labelled - 1,
        labels=row.input_ids[0, labelled],
    )
