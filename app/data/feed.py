"""From shards to workers: which rows each step of a training run computes, and on which worker.

The rows of step s follow from the shards, the batch size, the seed and s alone. The number of workers decides how a
step's rows are dealt out, not which they are; so a run may stop at any step and go on with other workers, at exactly
the row where it was.

An epoch is a permutation of the shards; the row stream that they make is cut into windows of whole steps, and the
rows of a window are permuted. Only a window at a time is in memory. A window is dealt out in packets, one for each
worker: its rows of all the window's steps.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.data.shards import COLUMNS, ROW_SCHEMA, Manifest

if TYPE_CHECKING:
    from app.data.batches import Batch

WINDOW_TOKENS = 8_000_000
_WIDTH_STEP = 8
_READ_AT_ONCE = 2
"""Windows, by tasks that reserve nothing: of those Ray Data would start all of a run's at once, the first no sooner."""


class Window(NamedTuple):
    """Steps `first_step` … `first_step + num_steps - 1`, which begin at row `first_row` of an epoch's stream."""

    epoch: int
    first_step: int
    num_steps: int
    first_row: int


@dataclass(frozen=True)
class Feed:
    shards: tuple[tuple[str, int], ...]
    """Files and their row counts, in the manifest's order."""
    batch_size: int
    """Rows of a step, over all workers."""
    total_steps: int
    seed: int
    pad_to: int | None
    """What rows are padded to; None pads to a little more than the longest of a batch."""
    window_rows: int
    max_length: int | None = None
    """No record is longer (packed rows are); None pads to just the longest of a batch."""

    @classmethod
    def of(cls, manifest: Manifest, *, batch_size: int, total_steps: int, seed: int) -> "Feed":
        """The training split of prepared data."""
        tokens = manifest.values["splits"]["train"]["tokens"]
        rows_of_tokens = WINDOW_TOKENS * manifest.num_rows("train") // max(1, tokens)
        return cls(
            shards=tuple(manifest.shards("train")),
            batch_size=batch_size,
            total_steps=total_steps,
            seed=seed,
            pad_to=manifest.fixed_length,
            window_rows=max(batch_size, rows_of_tokens),
            max_length=manifest.max_length,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; which rows are left over changes from epoch to epoch."""
        return sum(rows for _, rows in self.shards) // self.batch_size

    def width(self, longest: int) -> int:
        """Of a batch whose longest row has `longest` tokens: few widths come up, because oneDNN compiles each number of
        rows that it multiplies, and keeps that. Else a process with bf16 grew for thousands of steps."""
        if self.pad_to or self.max_length is None:
            return self.pad_to or longest
        return max(longest, min(-(-longest // _WIDTH_STEP) * _WIDTH_STEP, self.max_length))

    def position(self, step: int) -> dict[str, int]:
        """Where the data stands after `step` steps: whole epochs, and rows read of all."""
        return {"epoch": step // self.steps_per_epoch, "rows": step * self.batch_size}

    def windows(self, start_step: int = 0) -> Iterator[Window]:
        """The windows from the one that holds `start_step` (from 0) to the last, cut to the steps that are due."""
        per_window = self.window_rows // self.batch_size
        step = start_step
        while step < self.total_steps:
            epoch, of_epoch = divmod(step, self.steps_per_epoch)
            window_end = min((of_epoch // per_window + 1) * per_window, self.steps_per_epoch)
            num_steps = min(window_end - of_epoch, self.total_steps - step)
            yield Window(epoch, step, num_steps, of_epoch * self.batch_size)
            step += num_steps

    def read(self, window: Window) -> pa.Table:
        """The window's rows, in the order that its steps take them."""
        window_rows = self.window_rows // self.batch_size * self.batch_size
        number = window.first_row // window_rows
        # The whole window, also where a part of it is due: rows are permuted within the whole.
        first = number * window_rows
        last = min(first + window_rows, self.steps_per_epoch * self.batch_size)
        table = self._stream(window.epoch, first, last)
        order = np.random.default_rng((self.seed, window.epoch, number)).permutation(last - first)
        start = window.first_row - first
        return table.take(pa.array(order[start : start + window.num_steps * self.batch_size]))

    def packets(self, window: Window, *, workers: int) -> Iterator[pa.Table]:
        """For each worker a table of one row: its share of the window."""
        table = self.read(window)
        for worker in range(workers):
            mine = table.take(pa.array(np.arange(worker, table.num_rows, workers)))
            offsets = pa.array([0, mine.num_rows], pa.int32())
            columns: dict[str, Any] = {
                name: pa.ListArray.from_arrays(offsets, mine[name].combine_chunks()) for name in COLUMNS
            }
            about = {"worker": [worker], "first_step": [window.first_step], "num_steps": [window.num_steps]}
            yield pa.table({**about, **columns})

    def batches(self, packet: pa.Table, *, workers: int) -> Iterator["Batch"]:
        """The steps of a packet, in order."""
        from app.data.batches import collate  # torch: the processes that only read do without those seconds

        worker = packet["worker"][0].as_py()
        columns = [_row_arrays(packet[name].combine_chunks().flatten()) for name in COLUMNS]
        start = 0
        for step in range(packet["num_steps"][0].as_py()):
            # Row i of the window goes to worker i mod `workers`; how many of a step's are mine varies by one.
            first, last = step * self.batch_size, (step + 1) * self.batch_size
            count = len(range(first + (worker - first) % workers, last, workers))
            ids, masks, lengths = (column[start : start + count] for column in columns)
            yield collate(ids, masks, lengths, pad_to=self.width(max(map(len, ids))))
            start += count

    def local_batches(self, start_step: int = 0) -> Iterator["Batch"]:
        """Whole steps from `start_step` on, for a process that is the only worker: without Ray, read as they come."""
        for window in self.windows(start_step):
            yield from self.batches(_only_packet(self, window), workers=1)

    def dataset(self, *, start_step: int, workers: int, reading_cpus: float = 1) -> Any:
        """A Ray Data dataset of the packets from `start_step` on: window after window, a block for each worker.

        `reading_cpus` is what each task that reads a window reserves.
        """
        import ray.data

        from app.data.pacing import pace

        windows = [{"window": list(window)} for window in self.windows(start_step)]
        dataset = ray.data.from_items(windows, override_num_blocks=len(windows)).map_batches(
            _read_packets,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"feed": self, "workers": workers},
            num_cpus=reading_cpus,
            compute=ray.data.TaskPoolStrategy(size=None if reading_cpus else _READ_AT_ONCE),
        )
        dataset.context.execution_options.preserve_order = True
        # Blocks are cut at this size, at rows: each packet becomes one, which a worker gets as a whole.
        dataset.context.target_max_block_size = 1
        pace(dataset)
        return dataset

    def _stream(self, epoch: int, first: int, last: int) -> pa.Table:
        """Rows `first` … `last - 1` of the epoch's shards laid end to end."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
        tables, position = [ROW_SCHEMA.empty_table()], 0
        for index in order:
            file, rows = self.shards[index]
            start, end = max(first - position, 0), min(last - position, rows)
            if start < end:
                tables.append(pq.read_table(file, schema=ROW_SCHEMA).slice(start, end - start))
            position += rows
        return pa.concat_tables(tables)


def _read_packets(items: pa.Table, *, feed: Feed, workers: int) -> Iterator[pa.Table]:
    for window in items["window"].to_pylist():
        yield from feed.packets(Window(*window), workers=workers)


@functools.lru_cache(maxsize=2)
def _only_packet(feed: Feed, window: Window) -> pa.Table:
    """Kept for the next that asks: runs that are trained side by side mostly read the same."""
    return next(feed.packets(window, workers=1))


def _row_arrays(lists: Any) -> list[np.ndarray]:
    """The rows of a list array as arrays of their own."""
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return np.split(values, np.cumsum(lists.value_lengths().to_numpy())[:-1])
