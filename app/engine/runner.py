"""Runs the model over one step's rows. Knows tensors and sequences, not queues or sampling."""

from collections.abc import Sequence as SequenceOf
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.engine.deltas import MixedModel, Variant
from app.engine.kernels import Kernels
from app.engine.kv_cache import KVCache, StepCache, to_device
from app.engine.packing import has_onednns, round_up
from app.engine.sequence import Sequence

if TYPE_CHECKING:  # Triton may be missing
    from app.engine.kernels.paged_attention import PagedAttention


class Runner:
    def __init__(
        self,
        model: MixedModel,
        head: nn.Module,
        cache: KVCache,
        kernels: Kernels | None,
        *,
        paged: "PagedAttention | None" = None,
    ) -> None:
        self.model = model
        self.head = head
        self.cache = cache
        self.kernels = kernels
        self.paged = paged
        self._dtype = model.base.token_embedding.weight.dtype
        self._compiled_blocks = model.compiled_blocks(cache.layers)
        self._has_few_row_counts = has_onednns(model.decoder, head)

    @torch.inference_mode()
    def run(self, sequences: SequenceOf[Sequence]) -> tuple[list[Sequence], Tensor]:
        """Compute the scheduled tokens of `sequences`, which enter the cache.

        Returns those whose newest token was among them, and the logits [of them, vocab_size] after it.
        """
        ordered = sorted(sequences, key=lambda sequence: sequence.variant.hash)
        step = StepCache(self.cache, ordered, self.kernels, self.paged, dtype=self._dtype)
        device = step.positions.device
        ids = to_device(torch.tensor([token for sequence in ordered for token in sequence.scheduled_ids]), device)
        filling = (0, self._rows(len(ids)) - len(ids))
        ids, positions = F.pad(ids, filling), F.pad(step.positions, filling)
        # Only rows that sample go through the head: its matrix is the largest of a small model.
        last_rows = torch.tensor([sequence.num_scheduled for sequence in ordered]).cumsum(0) - 1
        sampling = [number for number, sequence in enumerate(ordered) if sequence.will_sample]
        sampled = to_device(F.pad(last_rows[sampling], (0, self._rows(len(sampling)) - len(sampling))), device)
        self.model.serve(_groups(ordered))
        if len(sampled) < len(ids) and self.model.can_end_with_few_rows:
            step.needed = sampled
        hidden = self.model.decoder.final_norm(self._through_blocks(ids, positions, step))[0]
        logits = self.head(hidden if step.needed is not None else hidden[sampled])[: len(sampling)]
        return [ordered[number] for number in sampling], logits

    def _through_blocks(self, ids: Tensor, positions: Tensor, step: StepCache) -> Tensor:
        """[1, rows, width]"""
        decoder = self.model.decoder
        x = decoder.token_embedding(ids).unsqueeze(0)
        compiled, positions = self._compiled_blocks, positions.unsqueeze(0)
        can_run = compiled is not None and compiled.can_run(len(ids)) and step.is_one_by_one(len(ids))
        updates = self.model.updates if can_run else None
        if compiled is None or updates is None:
            return self.model.run_blocks(x, positions, step)
        x += decoder.position_embedding(positions)
        count = len(compiled) if step.needed is None else len(compiled) - 1  # the last one leaves rows out
        compiled.run(
            x[0], count, blocks=step.blocks, offsets=step.offsets, rows=step.rows, seen=step.seen, tables=step.tables,
            table_of_row=step.table_of_row, updates=updates,
        )  # fmt: skip
        return x if step.needed is None else decoder.blocks[-1](x, step, None)

    def _rows(self, num_rows: int) -> int:
        return round_up(num_rows) if self._has_few_row_counts else num_rows


def _groups(ordered: SequenceOf[Sequence]) -> list[tuple[Variant, slice]]:
    """The rows of each variant, which lie together."""
    groups, first = [], 0
    for _, members in groupby(ordered, key=lambda sequence: sequence.variant.hash):
        of_variant = list(members)
        last = first + sum(sequence.num_scheduled for sequence in of_variant)
        groups.append((of_variant[0].variant, slice(first, last)))
        first = last
    return groups
