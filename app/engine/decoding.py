"""Steps in which every sequence has one row, and is the base's: recorded as CUDA graphs, one for each number of rows.

Such a step costs the host one copy to the GPU, one launch and one copy back. Where all rows take their likeliest token,
the GPU goes on by itself: the token it chose is the next step's input there already, so the next step is launched
before this one's tokens have come, and the host reports them while the GPU computes. What was launched so is used only
if the next step's sequences are those that were expected; else it is dropped, and the step is computed as if it had
never been: it has written nothing but the keys and values of places that nobody has read.
"""

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from app.engine.blocks import BLOCK_SIZE
from app.engine.kv_cache import KVCache
from app.engine.sampling import Choice, sample
from app.engine.sequence import Sequence

_SLOTS = 4
"""Steps that may be under way at once, and one more."""


class StepModel(Protocol):
    """What a step computes; see `decode_model.DecodeModel`."""

    def logits(self, ids: Tensor, seen: Tensor, tables: Tensor) -> Tensor: ...
    def take_largest(self, logits: Tensor, tokens: Tensor, ids: Tensor, seen: Tensor) -> None: ...


class Decoding:
    """At most `max_rows` rows, of sequences of at most `max_blocks` blocks. Where the device is no GPU, nothing is
    recorded and every step is computed as it is launched."""

    def __init__(self, model: StepModel, cache: KVCache, *, max_rows: int, max_blocks: int) -> None:
        self._model = model
        self._cache = cache
        self._device = cache.keys.device
        self._max_blocks = max_blocks
        self._row_counts = row_counts(max_rows)
        self._steps: dict[int, _Step] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._slots = [_Slot(self._row_counts[-1], max_blocks, self._device) for _ in range(_SLOTS)]
        self._next_slot = 0
        self._tables = np.zeros((self._row_counts[-1], max_blocks), np.int32)
        """Of the sequences that were launched last, the blocks of each."""
        self._ahead: _Launched | None = None
        self.num_ahead = 0
        """Steps whose results were there before they were asked for."""

    def suits(self, sequences: SequenceOf[Sequence]) -> bool:
        """Whether all that these have scheduled is the newest token of the base's."""
        return all(s.num_scheduled == 1 and s.num_cached + 1 == len(s.ids) and not s.variant.hash for s in sequences)

    @torch.inference_mode()
    def choices(self, sequences: list[Sequence], *, may_look_ahead: bool) -> list[Choice]:
        """Compute the step. `may_look_ahead`: the next one is likely to have the same sequences."""
        launched, self._ahead = self._ahead, None
        if launched is not None and launched.is_for(sequences):
            self.num_ahead += 1
        else:
            launched = self._launch(sequences)
        if not launched.is_greedy:
            return sample(launched.step.logits[: len(sequences)], sequences)
        if may_look_ahead and launched.num_left > 1:
            self._ahead = self._launch_next(launched)
        return [Choice(token) for token in launched.slot.tokens(len(sequences))]

    def forget(self) -> None:
        """The cache has changed in another way: nothing that was launched ahead holds any more."""
        self._ahead = None

    def _launch(self, sequences: list[Sequence]) -> "_Launched":
        num_rows = len(sequences)
        step = self._step(num_rows)
        slot = self._take_slot()
        seen = np.zeros(step.num_rows, np.int32)
        seen[:num_rows] = [s.variant.prefix_length + len(s.ids) for s in sequences]
        for row, sequence in enumerate(sequences):
            self._tables[row, : len(sequence.blocks)] = sequence.blocks
        host = slot.numbers[: step.numbers.numel()]
        ids = host[: step.num_rows]
        ids[:num_rows] = [s.ids[-1] for s in sequences]
        ids[num_rows:] = 0
        host[step.num_rows : 2 * step.num_rows] = seen
        host[2 * step.num_rows :] = self._tables[: step.num_rows].ravel()
        step.numbers.copy_(slot.pinned[: len(host)], non_blocking=True)
        step.replay()
        slot.fetch(step.tokens)
        return _Launched(
            sequences,
            [s.blocks[-1] for s in sequences],
            step,
            slot,
            seen,
            num_left=min(s.max_length - len(s.ids) for s in sequences),
            is_greedy=all(s.sampling.is_greedy for s in sequences),
        )

    def _launch_next(self, last: "_Launched") -> "_Launched | None":
        """The step after `last`, whose tokens are on the GPU alone; None where the cache has no room for it."""
        step, blocks, num_rows = last.step, last.blocks, len(last.sequences)
        crossing = np.flatnonzero(last.seen[:num_rows] % BLOCK_SIZE == 0)  # whose next place is in another block
        if len(crossing):
            blocks = blocks.copy()
            for row in crossing.tolist():
                sequence = last.sequences[row]
                if not self._cache.reserve(sequence, len(sequence.ids) + 1):
                    return None
                blocks[row] = sequence.blocks[-1]
                self._tables[row, len(sequence.blocks) - 1] = blocks[row]
        slot = self._take_slot()
        if len(crossing):
            host = slot.numbers[2 * step.num_rows : step.numbers.numel()]
            host[:] = self._tables[: step.num_rows].ravel()
            step.tables.copy_(slot.pinned[2 * step.num_rows : step.numbers.numel()], non_blocking=True)
        step.replay()
        slot.fetch(step.tokens)
        seen = last.seen + (last.seen > 0)
        return _Launched(last.sequences, blocks, step, slot, seen, num_left=last.num_left - 1, is_greedy=True)

    def _step(self, num_rows: int) -> "_Step":
        count = self._row_counts[bisect_left(self._row_counts, num_rows)]
        if count not in self._steps:
            self._steps[count] = _Step.of(self._model, count, self._max_blocks, self._device, self._pool)
        return self._steps[count]

    def _take_slot(self) -> "_Slot":
        slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % _SLOTS
        slot.wait()
        return slot


def row_counts(max_rows: int) -> list[int]:
    """Numbers of rows that steps are recorded for, the last at least `max_rows`; other steps are filled up."""
    counts = [1, 2, 4]
    while counts[-1] < max_rows:
        counts.append(counts[-1] + (4 if counts[-1] < 8 else 8 if counts[-1] < 64 else 32))
    return counts


@dataclass(eq=False)
class _Launched:
    """A step whose results are there, or will be."""

    sequences: list[Sequence]
    blocks: list[int]
    """The last of each sequence."""
    step: "_Step"
    slot: "_Slot"
    seen: np.ndarray
    """int32 [rows], those that fill up too: places that each row sees."""
    num_left: int
    """Tokens that the first of these sequences to end may still take, this step's among them."""
    is_greedy: bool

    def is_for(self, sequences: list[Sequence]) -> bool:
        """Whether it has computed what `sequences` have scheduled. One of them that gave up its blocks and has others
        now has nothing in them."""
        return self.sequences == sequences and self.blocks == [s.blocks[-1] for s in sequences]


class _Slot:
    """What one step takes from the host and brings back, in memory that the GPU reads and writes by itself."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.pinned = torch.zeros(max_rows * (2 + max_blocks), dtype=torch.int32, pin_memory=is_cuda)
        self.numbers = self.pinned.numpy()
        self._tokens = torch.zeros(max_rows, dtype=torch.int32, pin_memory=is_cuda)
        self._done = torch.cuda.Event() if is_cuda else None

    def fetch(self, tokens: Tensor) -> None:
        self._tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def tokens(self, num_rows: int) -> list[int]:
        self.wait()
        return self._tokens[:num_rows].tolist()


@dataclass(eq=False)
class _Step:
    """The computation of a number of rows, in tensors that stay where they are."""

    num_rows: int
    numbers: Tensor
    """int32: the newest token of each row, how many places it sees, and its blocks, one after the other."""
    tables: Tensor
    """The last part of `numbers`."""
    tokens: Tensor
    """int32 [rows]: the likeliest. They are in `numbers` already as the next step's, which sees one place more."""
    logits: Tensor
    """[rows, vocab_size], until another step is replayed."""
    replay: Callable[[], object]

    @classmethod
    def of(cls, model: StepModel, num_rows: int, max_blocks: int, device: torch.device, pool: object) -> "_Step":
        numbers = torch.zeros(num_rows * (2 + max_blocks), dtype=torch.int32, device=device)
        ids, seen = numbers[: 2 * num_rows].view(2, num_rows)
        tables = numbers[2 * num_rows :]
        tokens = torch.zeros(num_rows, dtype=torch.int32, device=device)

        def compute() -> Tensor:
            logits = model.logits(ids, seen, tables.view(num_rows, max_blocks))
            model.take_largest(logits, tokens, ids, seen)
            return logits

        # Rows see nothing yet, so that these runs write nothing.
        if device.type != "cuda":
            logits = compute()
            return cls(num_rows, numbers, tables, tokens, logits, lambda: logits.copy_(compute()))
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # kernels are compiled, and libraries take their memory
                compute()
                compute()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile: they load deltas.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
                logits = compute()
        return cls(num_rows, numbers, tables, tokens, logits, graph.replay)
