"""Runs the model over one step's rows. Knows tensors and sequences, not queues or sampling."""

from collections.abc import Sequence as SequenceOf
from itertools import groupby

import torch
from torch import Tensor, nn

from app.engine.deltas import MixedModel, Variant
from app.engine.kernels import Kernels
from app.engine.kv_cache import KVCache, StepCache
from app.engine.sequence import Sequence


class Runner:
    def __init__(self, model: MixedModel, head: nn.Module, cache: KVCache, kernels: Kernels | None) -> None:
        self.model = model
        self.head = head
        self.cache = cache
        self.kernels = kernels

    @torch.inference_mode()
    def run(self, sequences: SequenceOf[Sequence]) -> tuple[list[Sequence], Tensor]:
        """Compute the scheduled tokens of `sequences`, which enter the cache.

        Returns those whose newest token was among them, and the logits [of them, vocab_size] after it.
        """
        ordered = sorted(sequences, key=lambda sequence: sequence.variant.hash)
        step = StepCache(self.cache, ordered, self.kernels)
        device = step.positions.device
        ids = torch.tensor([token for sequence in ordered for token in sequence.scheduled_ids], device=device)
        with self.model.serving(_groups(ordered)) as decoder:
            embedded = decoder.token_embedding(ids).unsqueeze(0)
            hidden = decoder.final_norm(decoder.run_blocks(embedded, step.positions.unsqueeze(0), step))[0]
            # Only rows that sample go through the head: its matrix is the largest of a small model.
            last_rows = torch.tensor([sequence.num_scheduled for sequence in ordered]).cumsum(0) - 1
            sampling = [number for number, sequence in enumerate(ordered) if sequence.will_sample]
            logits = self.head(hidden[last_rows[sampling].to(device)])
        return [ordered[number] for number in sampling], logits


def _groups(ordered: SequenceOf[Sequence]) -> list[tuple[Variant, slice]]:
    """The rows of each variant, which lie together."""
    groups, first = [], 0
    for _, members in groupby(ordered, key=lambda sequence: sequence.variant.hash):
        of_variant = list(members)
        last = first + sum(sequence.num_scheduled for sequence in of_variant)
        groups.append((of_variant[0].variant, slice(first, last)))
        first = last
    return groups
