"""Runs the model over one step's rows. Knows tensors and spans, not queues or sampling."""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from app.engine.kv_cache import KVCache, Span
from app.engine.sequence import Sequence
from app.models.decoder import Decoder


class Runner:
    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self.model = model
        self.cache = cache

    @torch.inference_mode()
    def run(self, sequences: SequenceOf[Sequence]) -> Tensor:
        """Logits [sequences, vocab_size] after each sequence's last token; its uncached tokens enter the cache."""
        uncached = [sequence.uncached_ids for sequence in sequences]
        view = self.cache.view([_span(s, len(ids)) for s, ids in zip(sequences, uncached, strict=True)])
        rows = torch.tensor([token for ids in uncached for token in ids], device=view.positions.device)
        hidden = self.model(rows.unsqueeze(0), positions=view.positions.unsqueeze(0), cache=view)[0]  # [rows, width]
        # Only rows that sample go through the head: its matrix is the largest of a small model.
        return self.model.head(hidden[view.last_rows])


def _span(sequence: Sequence, length: int) -> Span:
    assert sequence.slot is not None, "only scheduled sequences run"
    return Span(slot=sequence.slot, start=sequence.num_cached, length=length)
