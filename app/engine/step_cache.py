"""`StepCache` is the decoder's `Context` for one step's rows: the new tokens of many sequences laid end to end, without
padding. Matrix products run over all rows at once, and only attention looks at each sequence by itself.
"""

import functools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from app.engine.blocks import BLOCK_SIZE, blocks_for
from app.engine.kernels import Kernels
from app.engine.kv_cache import KVCache, to_device
from app.engine.sequence import Sequence

if TYPE_CHECKING:  # Triton may be missing
    from app.engine.kernels.paged_attention import PagedAttention

_FEW_ROWS = 32
"""Up to here a sequence's new tokens go to the kernel that reads the cache in place, one by one."""
_FEW_ROWS_OF_CPU = 256
"""The same with the compiled kernels. For a prompt and a layer of GPT-2 124M in bf16, on two cores of an EPYC (Zen 4),
72 tokens take 0.22 ms there and 0.66 by torch's attention, 200 take 1.1 and 2.0."""
_ROWS_OF_BF16 = 64
"""torch's attention in bf16 on a CPU compiles products for each number of rows and places, for longer than a prompt
takes; so these are rounded up to a multiple."""


@dataclass(frozen=True)
class _Long:
    """The rows of a sequence with many new tokens, which are multiplied as a whole."""

    rows: slice
    blocks: Tensor
    """[blocks] those that hold places up to the last row's."""
    num_places: int
    """Up to the last row's; what stands behind them in these blocks nobody has written."""
    mask: Tensor | None
    """[rows, places] what each row sees; None: each row sees those before it, and nothing is cached yet."""
    num_filling: int
    """Rows to be added to these, whose results are dropped."""


class StepCache:
    """Attention of one step's rows [1, heads, rows, head_width] in `dtype`: the scheduled tokens of `sequences`, end to
    end."""

    def __init__(
        self,
        cache: KVCache,
        sequences: SequenceOf[Sequence],
        kernels: Kernels | None,
        paged: "PagedAttention | None" = None,
        *,
        dtype: torch.dtype,
    ) -> None:
        self.cache = cache
        self.kernels = kernels
        self.paged = paged
        self._dtype = dtype
        self.needed: Tensor | None = None
        """Those rows, int64, that are of use when all have been attended to; None: all."""
        device = cache.keys.device
        rows = _Rows.of(sequences)
        self.positions = to_device(rows.places, device)  # [rows]; the prefix counts
        """Rows that follow these in a step take part in nothing here."""
        self.blocks, self.offsets = to_device(rows.blocks, device), to_device(rows.offsets, device)
        self.seen = rows.seen
        self.rows = rows.numbers
        self.tables, self.table_of_row = rows.tables, rows.sequence_of_row
        few = _FEW_ROWS if kernels is None else _FEW_ROWS_OF_CPU
        self.long = [self._as_long(s, span) for s, span in rows.spans if span.stop - span.start > few]
        self._parts: dict[tuple[int, int], _Part] = {}

    def is_one_by_one(self, num_rows: int) -> bool:
        """Whether of `num_rows` in the step each is attended to by itself, and none only fills up."""
        return not self.long and num_rows == len(self.positions)

    @functools.cached_property
    def _whole(self) -> "_Part":
        return self.part(slice(0, len(self.positions)))

    def part(self, rows: slice) -> "_Part":
        """The same for some of the rows, whole sequences, as blocks that only they go through need it."""
        key = (rows.start, rows.stop)
        if key not in self._parts:  # all layers share it
            self._parts[key] = _Part(self, rows)
        return self._parts[key]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._whole.attend(layer, q, k, v)

    def _as_long(self, sequence: Sequence, rows: slice) -> _Long:
        device = self.positions.device
        first, last = sequence.variant.prefix_length + sequence.num_cached, int(self.seen[rows.stop - 1])
        multiple = _ROWS_OF_BF16 if self._dtype == torch.bfloat16 and device.type == "cpu" else 1
        num_filling = -(rows.stop - rows.start) % multiple
        blocks = sequence.blocks[: blocks_for(last)]
        if first == 0:
            return _Long(rows, to_device(torch.tensor(blocks), device), last, None, num_filling)
        blocks = blocks + [blocks[0]] * (-len(blocks) % max(1, multiple // BLOCK_SIZE))
        places = torch.arange(len(blocks) * BLOCK_SIZE)
        seen = F.pad(self.seen[rows], (0, num_filling), value=1)
        mask = to_device(places < seen.unsqueeze(1), device)
        return _Long(rows, to_device(torch.tensor(blocks), device), last, mask, num_filling)


class _Part:
    """`Context` of the rows `rows` of a step; rows are counted from the first of them."""

    def __init__(self, step: StepCache, rows: slice) -> None:
        self._cache, self._kernels, self._paged, self._tables = step.cache, step.kernels, step.paged, step.tables
        self._blocks, self._offsets = step.blocks[rows], step.offsets[rows]
        self._long = [
            (slice(long.rows.start - rows.start, long.rows.stop - rows.start), long)
            for long in step.long
            if rows.start <= long.rows.start < rows.stop
        ]
        self.short = step.rows[: rows.stop - rows.start]
        """Rows that are attended to one by one."""
        self._seen, self._table_of_row = step.seen[rows], step.table_of_row[rows]
        if self._long:
            is_short = torch.ones(rows.stop - rows.start, dtype=torch.bool)
            for place, _ in self._long:
                is_short[place] = False
            self.short = is_short.nonzero().squeeze(1)
            self._seen, self._table_of_row = self._seen[self.short], self._table_of_row[self.short]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_rows = len(self._blocks)
        self._store(layer, k[0], v[0])
        mixed = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)  # as the next product reads it
        if num_rows < q.shape[2]:
            mixed[:, :, num_rows:] = 0  # rows that only fill up
        for rows, long in self._long:
            mixed[:, :, rows] = self._attend_long(layer, long, q[:, :, rows], k[:, :, rows], v[:, :, rows])
        if len(self.short):
            self._attend_short(layer, q, mixed)
        return mixed

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """`k` and `v` [kv_heads, rows, head_width]; rows that only fill up are left out."""
        cache, blocks, offsets = self._cache, self._blocks, self._offsets
        if self._kernels is not None:
            self._kernels.write(k, v, cache.layers[layer], blocks=blocks, offsets=offsets)
            return
        k, v = (part[:, : len(blocks)].transpose(0, 1) for part in (k, v))
        if self._paged is None:
            cache.write(layer, blocks, offsets, k, v)
        else:
            self._paged.write(k, v, cache.layers[layer], blocks=blocks, offsets=offsets)

    def _attend_long(self, layer: int, long: _Long, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        is_grouped, num_rows = q.shape[1] != k.shape[1], q.shape[2]
        filling = (0, 0, 0, long.num_filling)
        if long.mask is None:
            q, k, v = (F.pad(part, filling) for part in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)[:, :, :num_rows]
        keys, values = self._gathered(layer, long.blocks.unsqueeze(0), q.dtype)
        for part in (keys, values):  # a mask does not hide what is not a number
            part[:, :, long.num_places :] = 0
        return F.scaled_dot_product_attention(
            F.pad(q, filling), keys, values, attn_mask=long.mask, enable_gqa=is_grouped
        )[:, :, :num_rows]

    def _attend_short(self, layer: int, q: Tensor, mixed: Tensor) -> None:
        """Each row by itself: one query where there are hundreds of keys."""
        short = self.short
        if self._kernels is not None:
            self._kernels.attend(
                q[0], self._cache.layers[layer], mixed[0],
                rows=short, seen=self._seen, tables=self._tables, table_of_row=self._table_of_row,
            )  # fmt: skip
            return
        if self._paged is not None:
            self._attend_paged(self._paged, layer, q[0].transpose(0, 1), mixed[0].transpose(0, 1))
            return
        tables, mask, rows, places = self._padded
        keys, values = self._gathered(layer, tables, q.dtype)  # [rows, kv_heads, places, head_width]
        for part in (keys, values):  # a mask does not hide what is not a number
            part[rows, :, places] = 0
        short = short.to(q.device)
        queries = q[0, :, short].transpose(0, 1).unsqueeze(2)  # [rows, heads, 1, head_width]
        is_grouped = queries.shape[1] != keys.shape[1]
        result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=is_grouped)
        mixed[0, :, short] = result.squeeze(2).transpose(0, 1)

    def _attend_paged(self, paged: "PagedAttention", layer: int, q: Tensor, mixed: Tensor) -> None:
        """The same by the GPU's kernel, of `q` [rows, heads, head_width] into `mixed` likewise."""
        cached = self._cache.layers[layer]
        rows, tables, seen = self._on_device
        if not self._long:
            paged.attend(q[: len(seen)], cached, mixed, tables=tables, seen=seen)
            return
        result = torch.empty(len(seen), *q.shape[1:], dtype=q.dtype, device=q.device)
        paged.attend(q[rows], cached, result, tables=tables, seen=seen)
        mixed[rows] = result

    @functools.cached_property
    def _on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """The short rows [rows], the blocks of each [rows, blocks], and how many places it sees [rows]."""
        tables = self._tables[self._table_of_row]
        return tuple(to_device(part, self._blocks.device) for part in (self.short, tables, self._seen))  # type: ignore[return-value]

    @functools.cached_property
    def _padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each short row its blocks [rows, blocks], as many as the longest has, and what it sees of them; then row
        and place of all that none sees: there another's may stand, or what nobody has written."""
        device = self._blocks.device
        num_blocks = blocks_for(int(self._seen.max()))
        tables = self._tables[self._table_of_row, :num_blocks].long()
        mask = torch.arange(num_blocks * BLOCK_SIZE) < self._seen.unsqueeze(1)
        rows, places = (~mask).nonzero(as_tuple=True)
        return tuple(  # type: ignore[return-value]
            to_device(part, device) for part in (tables, mask[:, None, None, :], rows, places)
        )

    def _gathered(self, layer: int, tables: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, places, head_width] of the blocks `tables` [rows, blocks], copied."""
        cached = self._cache.layers[layer]
        keys, values = (part[tables].to(dtype) for part in (cached.keys, cached.values))
        if cached.key_steps is not None and cached.value_steps is not None:
            keys = keys.transpose(4, 5).flatten(3, 4) * cached.key_steps[tables].unsqueeze(3).to(dtype)
            values = values.transpose(4, 5).flatten(3, 4) * cached.value_steps[tables].unsqueeze(4).to(dtype)
        return keys.permute(0, 2, 1, 4, 3).flatten(2, 3), values.permute(0, 2, 1, 3, 4).flatten(2, 3)


@dataclass(frozen=True)
class _Rows:
    numbers: Tensor
    """int64 [rows]: 0, 1, 2 and so on."""
    places: Tensor
    """int64 [rows]: of each row's token in its sequence, the prefix before it."""
    offsets: Tensor
    """int64 [rows]: the same in its block."""
    seen: Tensor
    """int64 [rows]: how many places it sees."""
    blocks: Tensor
    """int64 [rows]: the block of that place."""
    sequence_of_row: Tensor
    """int64 [rows]: the row of `tables`."""
    tables: Tensor
    """int32 [sequences, blocks]: each sequence's blocks, filled up with 0."""
    spans: list[tuple[Sequence, slice]]

    @classmethod
    def of(cls, sequences: SequenceOf[Sequence]) -> "_Rows":
        places: list[int] = []
        blocks: list[int] = []
        sequence_of_row: list[int] = []
        spans = []
        for number, sequence in enumerate(sequences):
            first, count = sequence.variant.prefix_length + sequence.num_cached, sequence.num_scheduled
            spans.append((sequence, slice(len(places), len(places) + count)))
            blocks += [sequence.blocks[place // BLOCK_SIZE] for place in range(first, first + count)]
            places += range(first, first + count)
            sequence_of_row += [number] * count
        offsets, seen = [place % BLOCK_SIZE for place in places], [place + 1 for place in places]
        longest = max(len(s.blocks) for s in sequences)
        tables = [s.blocks + [0] * (longest - len(s.blocks)) for s in sequences]
        # In two arrays: between two passes over all weights, each new operation is read from memory first.
        columns = torch.from_numpy(np.array([range(len(places)), places, offsets, seen, blocks, sequence_of_row]))
        return cls(
            numbers=columns[0],
            places=columns[1],
            offsets=columns[2],
            seen=columns[3],
            blocks=columns[4],
            sequence_of_row=columns[5],
            tables=torch.from_numpy(np.array(tables, dtype=np.int32)),
            spans=spans,
        )
