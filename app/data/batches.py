"""Rows of token ids -> padded tensors. One `Batch` is what one worker computes in one optimizer step."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of what is not in the loss, as torch's cross-entropy and `transformers` have it."""


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    """int64 [batch, time], padded on the right with 0."""
    loss_mask: Tensor
    """bool [batch, time]: whether predicting this token counts; never true on padding."""
    num_tokens: int
    """Tokens that are not padding."""
    positions: Tensor | None = None
    """int64 [batch, time]: where in its document a token stands. None where each row is one document."""
    documents: Tensor | None = None
    """int64 [batch, time]: which document of its row a token belongs to. None where each row is one document."""

    @property
    def labels(self) -> Tensor:
        """int64 [batch, time]: the ids in the loss, -100 elsewhere. Not shifted: position i is the label of i."""
        return self.input_ids.masked_fill(~self.loss_mask, IGNORED)

    @property
    def loss_tokens(self) -> int:
        """Tokens in the loss; the first of a row is predicted by nothing."""
        return int(self.loss_mask[:, 1:].sum())

    def split(self, parts: int) -> list["Batch"]:
        """The rows in `parts` batches, as even as can be; where rows are too few, the rest have nothing in the loss."""
        if parts == 1:
            return [self]
        pieces = [rows for rows in torch.arange(len(self.input_ids)).tensor_split(parts) if len(rows)]
        rest = [empty_batch().to(self.input_ids.device)] * (parts - len(pieces))
        return [self.rows(rows) for rows in pieces] + rest

    def rows(self, rows: Tensor | slice) -> "Batch":
        """Those rows; `num_tokens` is not theirs, and stays with the whole."""
        positions, documents = (None if t is None else t[rows] for t in (self.positions, self.documents))
        return Batch(self.input_ids[rows], self.loss_mask[rows], 0, positions, documents)

    def ends(self) -> Tensor:
        """int64 [batch]: where each row's last label ends. What stands behind it, as padding, influences no loss."""
        in_loss = self.loss_mask[:, 1:]
        return torch.where(in_loss.any(1), self.loss_mask.shape[1] - in_loss.flip(1).int().argmax(1), 0)

    def end_to_end(self, *, multiple: int | None = None) -> "Batch":
        """The rows in one, each up to its last label; a document of zeros fills it up to one of few lengths, or to a
        `multiple`: oneDNN makes a program for each, in milliseconds, and keeps it. Itself where nothing is in the
        loss."""
        kept = torch.arange(self.input_ids.shape[1]) < self.ends().unsqueeze(1)  # [batch, time]
        if not kept.any():
            return self
        positions = torch.arange(kept.shape[1]).expand(kept.shape) if self.positions is None else self.positions
        documents = torch.zeros_like(self.input_ids) if self.documents is None else self.documents
        documents = documents + torch.arange(len(documents)).unsqueeze(1) * (int(documents.max()) + 1)
        in_loss = self.loss_mask.clone()
        in_loss[:, 0] = False  # its row before it does not predict it
        ids, of_ids = self.input_ids[kept], documents[kept]
        filling = (filled_length(len(ids)) if multiple is None else -(-len(ids) // multiple) * multiple) - len(ids)
        return Batch(
            F.pad(ids, (0, filling)).unsqueeze(0),
            F.pad(in_loss[kept], (0, filling)).unsqueeze(0),
            self.num_tokens,
            F.pad(positions[kept], (0, filling)).unsqueeze(0),
            F.pad(of_ids, (0, filling), value=int(of_ids[-1]) + 1).unsqueeze(0),
        )

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.input_ids.to(device),
            self.loss_mask.to(device),
            self.num_tokens,
            None if self.positions is None else self.positions.to(device),
            None if self.documents is None else self.documents.to(device),
        )


def filled_length(num_tokens: int) -> int:
    """Of `num_tokens` end to end: 16 lengths from one power of two to the next."""
    multiple = max(32, (1 << num_tokens.bit_length()) // 32)
    return -(-num_tokens // multiple) * multiple


def collate(
    input_ids: Sequence[np.ndarray],
    loss_masks: Sequence[np.ndarray],
    lengths: Sequence[np.ndarray] | None = None,
    *,
    pad_to: int | None = None,
) -> Batch:
    """Pad rows to the longest of them, or to `pad_to`; `lengths` are those of the documents in each row.

    Padding is known by position, never by a pad token's id: GPT-2 has none, and masking by the end-of-text id in
    its place would teach the model never to stop.
    """
    shape = (len(input_ids), pad_to or max(len(ids) for ids in input_ids))
    ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    for row, (row_ids, row_mask) in enumerate(zip(input_ids, loss_masks, strict=True)):
        ids[row, : len(row_ids)] = row_ids
        mask[row, : len(row_mask)] = row_mask
    batch = Batch(torch.from_numpy(ids), torch.from_numpy(mask), sum(map(len, input_ids)))
    if lengths is None or all(len(of_row) == 1 for of_row in lengths):
        return batch
    positions, documents = _places(lengths, shape)
    return Batch(batch.input_ids, batch.loss_mask, batch.num_tokens, positions, documents)


def empty_batch() -> Batch:
    """A row with nothing in the loss, for a worker that has none of its own where the others compute one: under ZeRO-3
    each pass is a collective call."""
    return Batch(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool), 0)


def batches_by_length(rows: Iterable[tuple[np.ndarray, ...]], *, size: int) -> Iterator[Batch]:
    """`rows` of ids, loss mask and lengths in batches of `size`, the shortest first, so that little is padding."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    for first in range(0, len(ordered), size):
        yield collate(*zip(*ordered[first : first + size], strict=True))


def _places(lengths: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Positions and document numbers of packed rows. Padding is a document of its own, at position 0."""
    positions = np.zeros(shape, dtype=np.int64)
    documents = np.full(shape, max(map(len, lengths)), dtype=np.int64)
    for row, of_row in enumerate(lengths):
        total = int(np.sum(of_row))
        starts = np.cumsum(of_row) - of_row
        positions[row, :total] = np.arange(total) - np.repeat(starts, of_row)
        documents[row, :total] = np.repeat(np.arange(len(of_row)), of_row)
    return torch.from_numpy(positions), torch.from_numpy(documents)
