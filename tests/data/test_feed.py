import os
import time

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.encoding import Tokens
from app.data.feed import Feed
from app.data.shards import write_shard

ROWS = [7, 2, 13, 1, 20]  # in each shard


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, int], ...]:
    """Shards whose row number n reads [n, n, …]."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "train").mkdir()
    entries, number = [], 0
    for index, count in enumerate(ROWS):
        rows = [[Tokens([n] * (1 + n % 5), [(1, False), (n % 5, True)])] for n in range(number, number + count)]
        entry = write_shard(folder, "train", index=index, rows=rows)
        entries.append((str(folder / entry["file"]), entry["rows"]))
        number += count
    return tuple(entries)


def feed(shards, **values) -> Feed:
    defaults = {"batch_size": 4, "total_steps": 25, "seed": 0, "pad_to": None, "window_rows": 12}
    return Feed(shards, **(defaults | values))


def steps(feed: Feed, *, start_step: int = 0, workers: int = 1) -> list[list[int]]:
    """The row numbers of each step, over all workers."""
    found: dict[int, list[int]] = {}
    for window in feed.windows(start_step):
        for packet in feed.packets(window, workers=workers):
            assert packet.num_rows == 1
            for step, batch in enumerate(feed.batches(packet, workers=workers), start=window.first_step):
                found.setdefault(step, []).extend(batch.input_ids[:, 0].tolist())
                assert batch.num_tokens == sum(1 + n % 5 for n in batch.input_ids[:, 0].tolist())
    assert sorted(found) == list(range(start_step, feed.total_steps))
    return [sorted(found[step]) for step in sorted(found)]


@given(
    start=st.integers(0, 24), workers=st.integers(1, 4), window=st.integers(4, 60), seed=st.integers(0, 3),
    batch_size=st.integers(4, 9),
)  # fmt: skip
@settings(max_examples=60)
def test_a_run_that_goes_on_anywhere_with_any_workers_sees_the_rows_it_would_have(
    shards, start: int, workers: int, window: int, seed: int, batch_size: int
) -> None:
    whole = feed(shards, window_rows=max(window, batch_size), seed=seed, batch_size=batch_size)
    assert steps(whole, start_step=start, workers=workers) == steps(whole)[start:]


def test_an_epoch_sees_each_row_once_and_each_epoch_in_another_order(shards) -> None:
    whole = feed(shards)
    assert whole.steps_per_epoch == 10 and sum(ROWS) == 43
    first, second = steps(whole)[:10], steps(whole)[10:20]
    for epoch in (first, second):
        seen = [row for step in epoch for row in step]
        assert len(seen) == len(set(seen)) == 40
    assert first != second
    assert steps(feed(shards, seed=1)) != steps(whole)


def test_the_order_is_mixed_beyond_shards_and_windows(shards) -> None:
    (first, *_) = steps(feed(shards, window_rows=43))
    shard_of = np.searchsorted(np.cumsum(ROWS), first, side="right")
    assert len(set(shard_of.tolist())) > 1


def test_batches_of_a_fixed_layout_are_padded_to_it(shards) -> None:
    whole = feed(shards, pad_to=9, total_steps=1)
    (window,) = whole.windows()
    (packet,) = whole.packets(window, workers=1)
    (batch,) = whole.batches(packet, workers=1)
    assert batch.input_ids.shape == (4, 9)


def test_batches_come_in_few_widths_and_none_is_wider_than_the_longest_row_may_be(shards) -> None:
    assert [feed(shards, max_length=20).width(longest) for longest in (1, 8, 9, 16, 17, 20)] == [8, 8, 16, 16, 20, 20]
    assert feed(shards, pad_to=9, max_length=20).width(4) == 9 and feed(shards).width(5) == 5
    whole = feed(shards, max_length=20, total_steps=1)
    (window,) = whole.windows()
    (batch,) = whole.batches(*whole.packets(window, workers=1), workers=1)
    assert batch.input_ids.shape == batch.loss_mask.shape == (4, 8) and not batch.loss_mask[:, 5:].any()


def test_a_packet_that_is_a_slice_of_a_larger_block_is_read_right(shards) -> None:
    whole = feed(shards, total_steps=3)
    (window,) = whole.windows()
    both = pa.concat_tables(whole.packets(window, workers=2)).combine_chunks()
    (one, other) = whole.packets(window, workers=2)
    for part, packet in ((both.slice(0, 1), one), (both.slice(1, 1), other)):
        for mine, expected in zip(whole.batches(part, workers=2), whole.batches(packet, workers=2), strict=True):
            assert mine.input_ids.tolist() == expected.input_ids.tolist()


@pytest.mark.ray
def test_streaming_split_gives_every_worker_one_packet_of_each_window(ray_cluster: None, shards) -> None:
    import ray

    whole = feed(shards)
    expected = steps(whole)

    @ray.remote(num_cpus=0.5)
    def consume(split) -> list[tuple[int, list[int]]]:
        seen = []
        for packet in split.iter_batches(batch_size=None, batch_format="pyarrow"):
            first = packet["first_step"][0].as_py()
            for step, batch in enumerate(whole.batches(packet, workers=3), start=first):
                seen.append((step, batch.input_ids[:, 0].tolist()))
        return seen

    for start in (0, 7):
        splits = whole.dataset(start_step=start, workers=3).streaming_split(3, equal=True)
        per_worker = ray.get([consume.remote(split) for split in splits])
        for seen in per_worker:
            assert [step for step, _ in seen] == list(range(start, 25))
        for place, step in enumerate(range(start, 25)):
            assert sorted(row for seen in per_worker for row in seen[place][1]) == expected[step]


@pytest.mark.ray
def test_a_feed_that_is_ahead_of_its_workers_leaves_the_processor_to_them(ray_cluster: None, shards) -> None:
    dataset = feed(shards, total_steps=500).dataset(start_step=0, workers=1)
    dataset.context.execution_options.resource_limits = dataset.context.execution_options.resource_limits.copy(
        object_store_memory=2000
    )
    (split,) = dataset.streaming_split(1, equal=True)
    packets = iter(split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    next(packets)
    pid = ray.get(split._coord_actor.__ray_call__.remote(lambda _: os.getpid()))
    coordinator = psutil.Process(pid)  # by name there may be others, of the tests that run beside this one

    def seconds() -> float:
        """Of the processor, that what executes the dataset has used."""
        used = coordinator.cpu_times()
        return float(used.user + used.system)

    def share(during_s: float) -> float:
        """Of one core, that it uses for so long."""
        before, began = seconds(), time.monotonic()
        time.sleep(during_s)
        return (seconds() - before) / (time.monotonic() - began)

    deadline = time.monotonic() + 60
    while share(0.5) >= 0.4:  # it still gets ahead
        assert time.monotonic() < deadline, "it is never ahead enough"
    assert share(3) < 0.4
    assert next(packets)["first_step"][0].as_py() > 0, "and it goes on"


@pytest.mark.ray
def test_reading_that_reserves_no_cpu_does_not_start_all_of_a_runs_windows_at_once(ray_cluster: None, shards) -> None:
    whole = feed(shards, total_steps=500)
    assert len(list(whole.windows())) > 50
    (split,) = whole.dataset(start_step=0, workers=1, reading_cpus=0).streaming_split(1, equal=True)
    packets = iter(split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    most = []
    for _ in range(10):
        next(packets)
        active = split._coord_actor.__ray_call__.remote(
            lambda actor: max(operator.num_active_tasks() for operator in actor._current_executor._topology)
        )
        most.append(ray.get(active))
    assert 1 <= max(most) <= 2
