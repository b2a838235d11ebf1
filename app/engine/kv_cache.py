"""Keys and values of all running sequences: one slot per sequence, each reserved for a whole context.

Implements the decoder's `Context` for rows that are the new tokens of many sequences laid end to end, without padding:
matrix products run over all rows at once, and only attention looks at each sequence by itself. Knows no requests.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.attention import KeysValues, RowAttention
from app.models.decoder import DecoderConfig


@dataclass(frozen=True)
class Span:
    """One sequence's share of a step: `length` new tokens after `start` cached ones, the prefix not counted."""

    slot: int
    start: int
    length: int


class KVCache:
    """`prefix`, a layer's keys and values each, stands at the start of every slot."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        prefix: Sequence[KeysValues] = (),
    ) -> None:
        shape = (config.num_layers, num_slots, config.kv_heads, config.context_length, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.prefix = prefix
        self.prefix_length = prefix[0][0].shape[1] if prefix else 0
        for layer, (keys, values) in enumerate(prefix):
            self.keys[layer, :, :, : self.prefix_length] = keys
            self.values[layer, :, :, : self.prefix_length] = values
        # The lowest slot goes first: attention runs over all slots up to the highest that is in use.
        self._free = list(range(num_slots))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """A free slot; the caller has looked at `num_free`."""
        return heapq.heappop(self._free)

    def free(self, slot: int) -> None:
        assert slot not in self._free, f"slot {slot} is free already"
        heapq.heappush(self._free, slot)

    def view(self, spans: Sequence[Span]) -> "StepCache":
        """The cache as one step's rows see it."""
        return StepCache(self, spans)


class StepCache:
    """`Cache` for rows [1, rows]: the spans' new tokens, one span after the other."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        device = cache.keys.device
        self.cache = cache
        self.positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in spans]).to(device)  # [rows]
        lengths = torch.tensor([s.length for s in spans])
        self._slots = torch.tensor([s.slot for s in spans]).repeat_interleave(lengths).to(device)  # [rows]

        ends = lengths.cumsum(0).tolist()
        self.last_rows = torch.tensor([end - 1 for end in ends], device=device)  # [spans]
        prompts = [(end - s.length, end) for s, end in zip(spans, ends, strict=True) if s.length > 1]
        assert all(s.start == 0 for s in spans if s.length > 1), "a prompt is computed in one step"
        self._prompts = [(slice(start, end), RowAttention(prefix=cache.prefix or None)) for start, end in prompts]
        self._places = self.positions + cache.prefix_length  # in a slot
        self._singles = torch.tensor([end - 1 for s, end in zip(spans, ends, strict=True) if s.length == 1])
        if len(self._singles):
            self._singles = self._singles.to(device)
            self._single_slots = self._slots[self._singles]
            self._single_mask = self._mask_singles()

    def _mask_singles(self) -> Tensor:
        """Which cached positions the new token of each slot may see: bool [slots in use, 1, 1, longest]."""
        last = self.positions.new_zeros(int(self._single_slots.max()) + 1)
        last[self._single_slots] = self._places[self._singles]
        seen = torch.arange(int(last.max()) + 1, device=last.device) <= last.unsqueeze(1)
        return seen[:, None, None, :]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All [1, heads, rows, head_width]; keys and values may have fewer heads."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # [slots, heads, context, head_width]
        keys[self._slots, :, self._places] = k[0].transpose(0, 1)
        values[self._slots, :, self._places] = v[0].transpose(0, 1)

        mixed = torch.empty_like(q)
        for rows, attention in self._prompts:
            mixed[:, :, rows] = attention.attend(layer, q[:, :, rows], k[:, :, rows], v[:, :, rows])
        if len(self._singles):
            mixed[0, :, self._singles] = self._attend_singles(q[0, :, self._singles], keys, values)
        return mixed

    def _attend_singles(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One new token per sequence: q and the result are [heads, singles, head_width].

        Queries are spread over the slots rather than keys gathered from them: there is one query where there are
        hundreds of keys. A slot without a query computes something that nobody reads.
        """
        num_slots, *_, longest = self._single_mask.shape
        spread = q.new_zeros(num_slots, q.shape[0], 1, q.shape[2])
        spread[self._single_slots, :, 0] = q.transpose(0, 1)
        mixed = F.scaled_dot_product_attention(
            spread,
            keys[:num_slots, :, :longest],
            values[:num_slots, :, :longest],
            attn_mask=self._single_mask,
            enable_gqa=q.shape[0] != keys.shape[1],
        )
        return mixed[self._single_slots, :, 0].transpose(0, 1)
