"""Attention over the engine's KV cache on CUDA, in Triton: one query a row, blocks read where they lie.

Imported where needed: Triton may be missing. Layouts are those of `KVCache`. Grouped heads are programs of their own
side by side, which find the keys that they share in the L2 cache.

Where a batch is small, the places of a row are split over several programs (flash-decoding, Dao et al. 2023); the last
of them to arrive adds up what all have found.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from app.engine.blocks import BLOCK_SIZE
from app.engine.kernels import CachedLayer

_TILE = 8192
"""Keys, and as many values, that a program reads at once."""
_SPLIT_PLACES = 256
"""Fewer are not split: what the last program has to add up would take longer."""
NUM_WARPS = 4


@triton.jit
def paged_attention_kernel(  # type: ignore[no-untyped-def]
    q, k, v, keys, values, out, tables, seen, partial, arrived,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, table_row, seen_row, scale,
    HAS_NEW: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    SPLIT_PLACES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program a row, head and split. HAS_NEW: a row's last place is not in the cache yet; `k` and `v` hold it, and
    it is written there. A row that has `seen` nothing writes nothing. `arrived` is zero before and after."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv_head = head // (HEADS // KV_HEADS)
    width = tl.arange(0, PADDED_WIDTH)
    is_width = width < WIDTH
    offsets = tl.arange(0, BLOCK_SIZE)
    tables += row * table_row
    length = tl.load(seen + row * seen_row).to(tl.int32)
    query = tl.load(q + row * q_row + head * q_head + width, mask=is_width, other=0.0).to(tl.float32) * scale

    cached = length
    if HAS_NEW:
        cached = tl.maximum(length - 1, 0)
    places: tl.constexpr = BLOCKS * BLOCK_SIZE
    share = tl.cdiv(tl.cdiv(cached, SPLITS), places) * places
    share = tl.maximum(share, SPLIT_PLACES)
    num_splits = tl.maximum(tl.cdiv(cached, share), 1)
    if split >= num_splits:
        return
    first = split * share
    end = tl.minimum(cached, first + share)

    maximum = -1e30  # finite, so that what has seen nothing yet can be scaled by the difference of two of them
    total = 0.0
    mixed_new = tl.zeros((PADDED_WIDTH,), tl.float32)
    if HAS_NEW:  # noqa: SIM102 - this is decided when it is compiled, the next when it runs
        if split == 0:
            new_key = tl.load(k + row * k_row + kv_head * k_head + width, mask=is_width, other=0.0)
            new_value = tl.load(v + row * v_row + kv_head * v_head + width, mask=is_width, other=0.0)
            new_key = new_key.to(keys.dtype.element_ty)
            new_value = new_value.to(values.dtype.element_ty)
            maximum = tl.sum(query * new_key.to(tl.float32), 0)
            total = 1.0
            mixed_new = new_value.to(tl.float32)
            if (length > 0) & (head % (HEADS // KV_HEADS) == 0):
                block = tl.load(tables + cached // BLOCK_SIZE).to(tl.int64)
                lane = (block * KV_HEADS + kv_head) * (WIDTH * BLOCK_SIZE)
                offset = cached % BLOCK_SIZE
                tl.store(keys + lane + width * BLOCK_SIZE + offset, new_key, mask=is_width)
                tl.store(values + lane + offset * WIDTH + width, new_value, mask=is_width)

    # Online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867), BLOCKS blocks at once.
    mixed = tl.zeros((BLOCKS, BLOCK_SIZE, PADDED_WIDTH), tl.float32)
    new_weight = 1.0
    for start in range(first, end, places):
        numbers = start // BLOCK_SIZE + tl.arange(0, BLOCKS)
        is_block = numbers * BLOCK_SIZE < end
        block = tl.load(tables + numbers, mask=is_block, other=0).to(tl.int64)
        lanes = (block * KV_HEADS + kv_head) * (WIDTH * BLOCK_SIZE)
        is_place = numbers[:, None] * BLOCK_SIZE + offsets[None, :] < end
        key = tl.load(
            keys + lanes[:, None, None] + width[None, :, None] * BLOCK_SIZE + offsets[None, None, :],
            mask=is_block[:, None, None] & is_width[None, :, None],
            other=0.0,
        )
        value = tl.load(
            values + lanes[:, None, None] + offsets[None, :, None] * WIDTH + width[None, None, :],
            mask=is_place[:, :, None] & is_width[None, None, :],
            other=0.0,
        )
        scores = tl.sum(key.to(tl.float32) * query[None, :, None], 1)
        scores = tl.where(is_place, scores, -1e30)
        larger = tl.maximum(maximum, tl.max(tl.max(scores, 1), 0))
        shrunk = tl.exp(maximum - larger)
        weights = tl.where(is_place, tl.exp(scores - larger), 0.0)
        total = total * shrunk + tl.sum(tl.sum(weights, 1), 0)
        mixed = mixed * shrunk + weights[:, :, None] * value.to(tl.float32)
        new_weight = new_weight * shrunk
        maximum = larger
    result = tl.sum(tl.sum(mixed, 1), 0) + mixed_new * new_weight

    out += row * out_row + head * out_head + width
    if num_splits == 1:
        tl.store(out, result / tl.maximum(total, 1e-30), mask=is_width)
        return
    slot = row * HEADS + head
    partial += slot * (SPLITS * (PADDED_WIDTH + 2))
    mine = partial + split * (PADDED_WIDTH + 2)
    tl.store(mine + width, result)
    tl.store(mine + PADDED_WIDTH, maximum)
    tl.store(mine + PADDED_WIDTH + 1, total)
    tl.debug_barrier()  # all threads' stores before one thread's count
    if tl.atomic_add(arrived + slot, 1, sem="acq_rel") == num_splits - 1:
        tl.debug_barrier()
        splits = tl.arange(0, SPLITS)
        is_there = splits < num_splits
        theirs = partial + splits * (PADDED_WIDTH + 2)
        maxima = tl.load(theirs + PADDED_WIDTH, mask=is_there, other=-1e30, cache_modifier=".cg")
        totals = tl.load(theirs + PADDED_WIDTH + 1, mask=is_there, other=0.0, cache_modifier=".cg")
        results = tl.load(theirs[:, None] + width[None, :], mask=is_there[:, None], other=0.0, cache_modifier=".cg")
        share_of = tl.exp(maxima - tl.max(maxima, 0))
        together = tl.sum(results * share_of[:, None], 0) / tl.sum(totals * share_of, 0)
        tl.store(out, together, mask=is_width)
        tl.store(arrived + slot, 0)


@triton.jit
def write_cache_kernel(  # type: ignore[no-untyped-def]
    k, v, keys, values, blocks, offsets, k_row, k_head, v_row, v_head, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program a row and head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    width = tl.arange(0, PADDED_WIDTH)
    is_width = width < WIDTH
    lane = (tl.load(blocks + row).to(tl.int64) * KV_HEADS + head) * (WIDTH * BLOCK_SIZE)
    offset = tl.load(offsets + row)
    key = tl.load(k + row * k_row + head * k_head + width, mask=is_width, other=0.0)
    value = tl.load(v + row * v_row + head * v_head + width, mask=is_width, other=0.0)
    tl.store(keys + lane + width * BLOCK_SIZE + offset, key.to(keys.dtype.element_ty), mask=is_width)
    tl.store(values + lane + offset * WIDTH + width, value.to(values.dtype.element_ty), mask=is_width)


class PagedAttention:
    """`attend_new` for up to `max_rows` rows of `num_heads` heads; `num_splits` that a row is split into at most.

    `overlaps`: kernels begin before those in front of them have ended (programmatic dependent launch), and wait for
    them where they read what those write. For GPUs of compute capability 9.0 and above.
    """

    def __init__(
        self, *, max_rows: int, num_heads: int, head_width: int, device: torch.device, overlaps: bool = False
    ) -> None:
        self.overlaps = overlaps
        self._padded_width = triton.next_power_of_2(head_width)
        self._num_processors = _num_processors(device)
        places = max(self.num_splits(rows, num_heads) * rows for rows in range(1, max_rows + 1)) * num_heads
        self._partial = torch.empty(places * (self._padded_width + 2), dtype=torch.float32, device=device)
        self._arrived = torch.zeros(max_rows * num_heads, dtype=torch.int32, device=device)

    def num_splits(self, num_rows: int, num_heads: int) -> int:
        """A power of two, at most 16, so that the programs fill the GPU."""
        splits = 1
        while splits < 16 and num_rows * num_heads * splits * 2 <= 2 * self._num_processors:
            splits *= 2
        return splits

    def attend(self, q: Tensor, cached: CachedLayer, out: Tensor, *, tables: Tensor, seen: Tensor) -> None:
        """Into `out` [rows, heads, head_width], of `q` likewise: each over the first `seen` int [rows] places of the
        sequence with the blocks `tables` int32 [rows, blocks]."""
        self._launch(q, q, q, cached, out, tables=tables, seen=seen, has_new=False, num_splits=1)

    def attend_new(
        self, q: Tensor, k: Tensor, v: Tensor, cached: CachedLayer, out: Tensor, *, tables: Tensor, seen: Tensor
    ) -> None:
        """The same where the last of the places that a row sees is `k` and `v` [rows, kv_heads, head_width], which are
        written there. No two rows may be of one sequence. A row that has seen nothing writes nothing."""
        splits = self.num_splits(len(q), q.shape[1])
        self._launch(q, k, v, cached, out, tables=tables, seen=seen, has_new=True, num_splits=splits)

    def write(self, k: Tensor, v: Tensor, cached: CachedLayer, *, blocks: Tensor, offsets: Tensor) -> None:
        """`k` and `v` [rows, kv_heads, head_width] into places `offsets` of `blocks`, both int64 [rows]."""
        rows, kv_heads, width = k.shape
        assert k.stride(2) == v.stride(2) == 1
        with torch.cuda.device_of(k):
            write_cache_kernel[(rows, kv_heads)](
                k, v, cached.keys, cached.values, blocks, offsets, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                kv_heads, width, self._padded_width, BLOCK_SIZE, num_warps=1,
            )  # fmt: skip

    def _launch(
        self, q: Tensor, k: Tensor, v: Tensor, cached: CachedLayer, out: Tensor, *, tables: Tensor, seen: Tensor,
        has_new: bool, num_splits: int,
    ) -> None:  # fmt: skip
        keys, values = cached.keys, cached.values
        rows, heads, width = q.shape
        assert q.stride(2) == k.stride(2) == v.stride(2) == out.stride(2) == 1 and tables.stride(1) == 1
        options = {"launch_pdl": True} if self.overlaps else {}
        with torch.cuda.device_of(q):
            paged_attention_kernel[(rows, heads, num_splits)](
                q, k, v, keys, values, out, tables, seen, self._partial, self._arrived,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0),
                out.stride(1), tables.stride(0), seen.stride(0), width**-0.5,
                has_new, heads, keys.shape[1], width, self._padded_width, blocks_at_once(self._padded_width),
                BLOCK_SIZE, num_splits, _SPLIT_PLACES, self.overlaps, num_warps=NUM_WARPS, **options,
            )  # fmt: skip


def blocks_at_once(padded_width: int) -> int:
    return max(1, _TILE // (padded_width * BLOCK_SIZE))


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 64  # in Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
