"""Runs the model over one step's rows. Knows tensors and sequences, not queues or sampling."""

from collections.abc import Sequence as SequenceOf
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.engine.deltas import MixedModel, Variant
from app.engine.kernels import Before, Kernels
from app.engine.kv_cache import KVCache, to_device
from app.engine.packing import has_onednns, round_up
from app.engine.sequence import Sequence
from app.engine.site import Site
from app.engine.step_cache import StepCache

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
        norm = model.decoder.final_norm
        self._passage = Before(norm.base) if kernels is not None and isinstance(norm, Site) else None
        self._has_few_row_counts = has_onednns(model.decoder, head)

    @torch.inference_mode()
    def run(self, sequences: SequenceOf[Sequence]) -> tuple[list[Sequence], Tensor]:
        """Compute the scheduled tokens of `sequences`, which enter the cache.

        Returns those whose newest token was among them, and the logits [of them, vocab_size] after it.
        """
        ordered = sorted(sequences, key=lambda sequence: sequence.variant.hash)
        step = StepCache(self.cache, ordered, self.kernels, self.paged, dtype=self._dtype)
        device = step.positions.device
        ids = torch.tensor([token for sequence in ordered for token in sequence.scheduled_ids])
        ids, positions = (self._filled_up(rows) for rows in (to_device(ids, device), step.positions))
        # Only rows that sample go through the head: its matrix is the largest of a small model.
        last_rows = list(accumulate(sequence.num_scheduled for sequence in ordered))
        sampling = [number for number, sequence in enumerate(ordered) if sequence.will_sample]
        sampled = self._filled_up(
            to_device(torch.tensor([last_rows[number] - 1 for number in sampling], dtype=torch.int64), device)
        )
        self.model.serve(_groups(ordered))
        if len(sampled) < len(ids) and self.model.can_end_with_few_rows:
            step.needed = sampled
        hidden = self._normed(ids, positions, step)
        is_each = step.needed is not None or len(sampling) == last_rows[-1]
        logits = self.head(hidden if is_each else hidden[sampled])[: len(sampling)]
        return [ordered[number] for number in sampling], logits

    def _normed(self, ids: Tensor, positions: Tensor, step: StepCache) -> Tensor:
        """[rows, width], through blocks and final norm; those that are needed."""
        decoder, compiled = self.model.decoder, self._compiled_blocks
        can_run = compiled is not None and compiled.can_run(len(ids)) and step.is_one_by_one(len(ids))
        updates = self.model.updates if can_run else None
        if compiled is None or updates is None:
            x = self.model.run_blocks(decoder.token_embedding(ids).unsqueeze(0), positions.unsqueeze(0), step)
            return self._through_norm(x)
        count = len(compiled) if step.needed is None else len(compiled) - 1  # the last one leaves rows out
        is_normed = count == len(compiled) and not decoder.final_norm.is_active
        x = compiled.run(
            ids, positions, count, is_normed=is_normed, blocks=step.blocks, offsets=step.offsets, rows=step.rows,
            seen=step.seen, tables=step.tables, table_of_row=step.table_of_row, updates=updates,
        ).unsqueeze(0)  # fmt: skip
        if step.needed is not None:
            x = decoder.blocks[-1](x, step, None)
        return x[0] if is_normed else self._through_norm(x)

    def _through_norm(self, x: Tensor) -> Tensor:
        """[rows, width] of `x` [1, rows, width], by the same kernel as in one call with the blocks."""
        norm = self.model.decoder.final_norm
        if self.kernels is None or self._passage is None or norm.is_active:
            return norm(x)[0]
        return self.kernels.prepare(x[0].contiguous(), self._passage, None, has_values=True, levels=None)[0]

    def _filled_up(self, rows: Tensor) -> Tensor:
        """`rows` [n], and zeros behind."""
        filling = round_up(len(rows)) - len(rows) if self._has_few_row_counts else 0
        return F.pad(rows, (0, filling)) if filling else rows


def _groups(ordered: SequenceOf[Sequence]) -> list[tuple[Variant, slice]]:
    """The rows of each variant, which lie together."""
    groups, first = [], 0
    for _, members in groupby(ordered, key=lambda sequence: sequence.variant.hash):
        of_variant = list(members)
        last = first + sum(sequence.num_scheduled for sequence in of_variant)
        groups.append((of_variant[0].variant, slice(first, last)))
        first = last
    return groups
