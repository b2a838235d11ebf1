"""The loss: negative log-likelihood, summed, over the tokens that count."""

import torch.nn.functional as F
from torch import Tensor

from app.data.batches import Batch
from app.models.decoder import Decoder


def masked_nll(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """(sum of -log p in nats, number of tokens summed) over `batch.loss_mask`.

    A sum and a count instead of a mean: only they add up right over workers and batches of uneven length. The head
    runs on the rows that count alone; the others' logits are never made.
    """
    hidden = model(batch.input_ids, positions=batch.positions, documents=batch.documents)
    hidden = hidden[:, :-1]  # [batch, time - 1, width]; position i predicts token i + 1
    keep = batch.loss_mask[:, 1:]
    nll = rows_nll(model, hidden[keep], batch.input_ids[:, 1:][keep])
    return nll, keep.sum()


def rows_nll(model: Decoder, rows: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) over `rows` [rows, width] with `labels` [rows]."""
    return F.cross_entropy(model.head(rows).float(), labels, reduction="sum")
