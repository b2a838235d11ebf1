"""No block is lost, held twice or found with another's content, whatever happens."""

import random
from pathlib import Path

import psutil
import pytest
import torch
from single import alone
from test_mixed_deltas import METHODS, trained, with_delta

from app.engine.blocks import BlockPool, block_key
from app.engine.engine import Engine, EngineSettings
from app.engine.events import InvalidRequest, QueueFull
from app.engine.kv_cache import KVCache
from app.engine.sampling import Sampling


def test_keys_tell_apart_whatever_comes_before():
    start, other = b"base", b"another"
    first = block_key(start, [1, 2])
    assert first == block_key(start, [1, 2])
    keys = {first, block_key(start, [1, 3]), block_key(other, [1, 2]), block_key(first, [1, 2]), block_key(start, [])}
    assert len(keys) == 5


def test_a_named_block_is_found_until_its_place_is_needed():
    pool = BlockPool(3)
    a, b = pool.take(), pool.take()
    pool.name(a, b"a")
    pool.release([a, b])
    assert pool.find(b"a") == a and pool.num_free == 2
    assert pool.find(b"a") == a, "a second holder"
    pool.release([a])
    assert pool.num_free == 2
    pool.release([a])
    assert {pool.take(), pool.take()} == {b, 2}, "blocks without content go first"
    assert pool.take() == a and pool.find(b"a") is None


def test_10000_random_operations_leave_no_block_behind(model):
    """Adds with and without deltas, priorities and n; steps; aborts; steps that fail; a cache that is too small."""
    draw = random.Random(3)
    size = KVCache.block_bytes(model.config, num_extra_layers=1, dtype=torch.float32)
    settings = EngineSettings(max_batch_size=6, max_queue=10, max_step_tokens=24, max_kv_bytes=14 * size)
    engine = Engine(model, settings)
    names = ["lora", "prefix", "extra block", "longer prefix"]
    deltas = [trained(model, METHODS[name], seed=1) for name in names]
    loaded = [None, *(engine.add_delta(delta) for delta in deltas)]
    beginnings = [[draw.randrange(97) for _ in range(20)] for _ in range(3)]
    living: set[int] = set()
    pool, run = engine._cache.pool, engine._runner.run
    seen = {"refused": 0, "aborted": 0, "failed": 0, "finished": 0}

    def fail(sequences):
        run(sequences)
        raise RuntimeError("out of something")

    for _ in range(10_000):
        action = draw.random()
        if action < 0.25:
            ids = draw.choice(beginnings)[: draw.randint(1, 20)] + [
                draw.randrange(97) for _ in range(draw.randint(0, 6))
            ]
            sampling = Sampling(max_tokens=draw.randint(1, 12), n=draw.choice([1, 1, 1, 3]))
            try:
                living.add(engine.add_request(ids, sampling, draw.choice(loaded), priority=draw.randint(0, 2)))
            except (QueueFull, InvalidRequest):
                seen["refused"] += 1
        elif action < 0.32 and living:
            seen["aborted"] += engine.abort(living.pop())
        elif action < 0.33:
            engine._runner.run = fail
            try:
                engine.step()
            except RuntimeError:
                seen["failed"] += 1
                engine.abort_all()
                living.clear()
            engine._runner.run = run
        else:
            for event in engine.step():
                seen["finished"] += event.finish_reason is not None
            living &= set(engine._requests)
        held = [block for s in engine._scheduler.running for block in s.blocks]
        assert [pool._holders[block] for block in range(14)] == [held.count(block) for block in range(14)]
        assert pool.num_free == 14 - len(set(held))
        assert all(not sequence.blocks for sequence in engine._scheduler.waiting)
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert (stats.free_blocks, stats.queued_tokens, stats.running, stats.waiting) == (14, 0, 0, 0)
    assert all(variant.num_requests == 0 for variant in engine.deltas._loaded.values())
    assert min(seen.values()) > 20 and stats.preemptions > 100 and stats.reused_tokens > 1000
    # and what the blocks hold is still what their keys say
    models = [model, *(with_delta(model, delta) for delta in deltas)]
    for changed, delta in zip(models, loaded, strict=True):
        request_id = engine.add_request(beginnings[0], Sampling(max_tokens=8), delta)
        tokens = []
        while engine.has_work:
            tokens += [event.token for event in engine.step() if event.request_id == request_id]
        assert tokens == alone(changed, beginnings[0], Sampling(max_tokens=8))


@pytest.mark.parametrize("max_kv_blocks", [3, 5])
def test_max_kv_bytes_is_honoured(model, max_kv_blocks):
    size = KVCache.block_bytes(model.config, num_extra_layers=1, dtype=torch.float32)
    engine = Engine(model, max_kv_bytes=max_kv_blocks * size + size - 1)
    cache = engine._cache
    assert cache.keys.nbytes + cache.values.nbytes == max_kv_blocks * size


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux")
@pytest.mark.parametrize(("kv_dtype", "size"), [("auto", 160 << 20), ("int8", 340 << 20)])
def test_the_caches_memory_is_taken_as_it_is_used_or_at_once(model, kv_dtype, size):
    """Keys and values, and in int8 their steps, are each more than malloc keeps for another time, 32 MiB."""
    grown = {}
    for prefault in (False, True):
        before = psutil.Process().memory_info().rss
        settings = EngineSettings(max_kv_bytes=size, max_extra_blocks=0, prefault_kv=prefault, kv_dtype=kv_dtype)
        engine = Engine(model, settings)
        grown[prefault] = psutil.Process().memory_info().rss - before
        parts = [part for layer in engine._cache.layers for part in vars(layer).values() if part is not None]
        assert sum(part.nbytes for part in parts) > size * 0.9
        del engine
    assert grown[False] < size / 4 and grown[True] > size * 0.9
