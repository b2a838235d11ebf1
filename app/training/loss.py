"""The loss: negative log-likelihood, summed, over the tokens that count."""

from torch import Tensor

from app.config.base import AttentionBackend
from app.data.batches import Batch
from app.models.decoder import Decoder
from app.models.kernels.cross_entropy import fused_cross_entropy


def masked_nll(model: Decoder, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(sum of -log p in nats, number of tokens summed) over `batch.loss_mask`, with labels smoothed by `smoothing`.

    A sum and a count instead of a mean: only they add up right over workers and batches of uneven length. The head
    runs on the rows that count alone, a chunk at a time; no tensor of all logits is ever made. The batch is taken
    `as_computed`.
    """
    batch = as_computed(batch, attention=model.attention)
    keep = batch.loss_mask[:, 1:]  # [batch, time - 1]; position i predicts token i + 1
    labels = batch.input_ids[:, 1:][keep]

    def nll(hidden: Tensor) -> Tensor:
        rows = hidden[:, :-1][keep]
        return fused_cross_entropy(rows, model.token_embedding.weight, labels, smoothing=smoothing)

    return model(batch.input_ids, positions=batch.positions, documents=batch.documents, then=nll), keep.sum()


def as_computed(batch: Batch, *, attention: AttentionBackend) -> Batch:
    """`batch`, end to end where that spares padding."""
    return batch.end_to_end() if is_computed_end_to_end(attention, batch.input_ids.device.type) else batch


def is_computed_end_to_end(attention: AttentionBackend, device: str) -> bool:
    """Whether rows are made one without padding: on a CPU, where attention goes document by document anyway."""
    return device == "cpu" and attention != "flex"
