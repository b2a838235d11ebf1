"""Steps of one row a sequence, launched ahead of their tokens: the answers are those of the eager engine.

On a CPU nothing is recorded and torch computes the steps; on a GPU it is all as it is used.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from single import collect, drain
from test_mixed_deltas import trained
from torch import Tensor

from app.config import LoraConfig
from app.engine.decoding import Decoding, row_counts
from app.engine.engine import Engine
from app.engine.kv_cache import BLOCK_SIZE, KVCache
from app.engine.sampling import Sampling
from app.models.quantization import QuantizationConfig, quantize

CONTEXT_BLOCKS = 3  # of 48 places
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class TorchStep:
    """What `DecodeModel` computes, by torch's operations."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cache = engine._cache

    def logits(self, ids: Tensor, seen: Tensor, tables: Tensor) -> Tensor:
        model = self._engine.deltas.model.base
        self._seen, self._tables = seen, tables.long()
        positions = (seen - 1).clamp_min(0).unsqueeze(0)
        return model.head(model.final_norm(model.run_blocks(model.token_embedding(ids).unsqueeze(0), positions, self)))[
            0
        ]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = torch.zeros_like(q)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        for row, seen in enumerate(self._seen.tolist()):
            if seen:
                block, offset = self._tables[row, (seen - 1) // BLOCK_SIZE], (seen - 1) % BLOCK_SIZE
                keys[block, :, :, offset], values[block, :, offset] = k[0, :, row], v[0, :, row]
                held_keys = keys[self._tables[row]].permute(1, 0, 3, 2).flatten(1, 2)[:, :seen]
                held_values = values[self._tables[row]].permute(1, 0, 2, 3).flatten(1, 2)[:, :seen]
                mixed[0, :, row] = F.scaled_dot_product_attention(q[0, :, row : row + 1], held_keys, held_values)[:, 0]
        return mixed

    def take_largest(self, logits: Tensor, tokens: Tensor, ids: Tensor, seen: Tensor) -> None:
        tokens.copy_(logits.argmax(dim=-1))
        ids.copy_(tokens)
        seen += seen > 0


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[needs_gpu, pytest.mark.gpu])])
def on(request, model, monkeypatch):
    """Engines that are eager, and that decode ahead, over the same model on a device: `on(decodes, **settings)`."""
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        there = copy.deepcopy(model).cuda()
        return lambda decodes, **settings: Engine(
            there, kernels="auto" if decodes else "torch", max_extra_blocks=0, **settings
        )

    def engine(decodes: bool, **settings) -> Engine:
        made = Engine(model, kernels="torch", max_extra_blocks=0, **settings)
        if decodes:
            max_rows = made.settings.max_batch_size
            made._decoding = Decoding(TorchStep(made), made._cache, max_rows=max_rows, max_blocks=CONTEXT_BLOCKS)
        return made

    return engine


def many_prompts(count: int = 40) -> list[list[int]]:
    """Of lengths 1 to 30; every third begins like the one before it."""
    generator = torch.Generator().manual_seed(4)
    prompts: list[list[int]] = []
    for number in range(count):
        ids = torch.randint(1, 97, (1 + 7 * number % 30,), generator=generator).tolist()
        prompts.append(prompts[-1][:17] + ids[:5] if number % 3 == 2 else ids)
    return prompts


def answers(engine: Engine, requests: list[tuple[list[int], Sampling]]) -> list[list[int]]:
    request_ids = [engine.add_request(ids, sampling) for ids, sampling in requests]
    tokens, _ = drain(engine)
    return [tokens[request_id] for request_id in request_ids]


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_forty_greedy_prompts_have_the_tokens_of_the_eager_engine(on, batch_size) -> None:
    requests = [(ids, Sampling(max_tokens=3 + number % 11)) for number, ids in enumerate(many_prompts())]
    settings = {"max_batch_size": batch_size, "max_queue": 40}
    engine = on(True, **settings)
    assert answers(engine, requests) == answers(on(False, **settings), requests)
    assert engine.stats().free_blocks == engine.stats().blocks


def test_steps_are_launched_ahead_where_the_same_answers_go_on(on) -> None:
    engine = on(True, max_batch_size=3, max_queue=1)
    answers(engine, [(ids, Sampling(max_tokens=12)) for ids in many_prompts(3)])
    assert engine._decoding.num_ahead == 10  # of 11: nobody was ahead of the first


def test_sampled_rows_and_those_with_penalties_decode_among_greedy_ones(on) -> None:
    kinds = [
        {},
        {"temperature": 0.8, "seed": 3},
        {"repetition_penalty": 1.5},
        {"temperature": 1.2, "top_k": 9, "seed": 4},
        {"logprobs": 2},
    ]
    requests = [(ids, Sampling(max_tokens=10, **kinds[n % 5])) for n, ids in enumerate(many_prompts(15))]
    settings = {"max_batch_size": 15, "max_queue": 1}
    assert answers(on(True, **settings), requests) == answers(on(False, **settings), requests)


def test_an_abort_and_a_newcomer_between_steps_change_nobody_else(on) -> None:
    results = []
    for decodes in (True, False):
        engine = on(decodes, max_batch_size=6, max_queue=8)
        tokens, reasons = {}, {}
        prompts = many_prompts(7)
        request_ids = [engine.add_request(ids, Sampling(max_tokens=14)) for ids in prompts[:5]]
        for step in range(40):
            if step == 4:
                assert engine.abort(request_ids[1])
            if step == 6:
                request_ids.append(engine.add_request(prompts[5], Sampling(max_tokens=14)))
            if step == 9:
                assert engine.abort(request_ids[4])
                request_ids.append(engine.add_request(prompts[6], Sampling(max_tokens=14)))
            collect(engine.step(), tokens, reasons)
        assert not engine.has_work and engine.stats().free_blocks == engine.stats().blocks
        results.append((tokens, reasons))
    assert results[0] == results[1]


def test_a_stop_token_ends_an_answer_whose_next_step_was_launched(on) -> None:
    ids = many_prompts(3)[2]
    free = answers(on(False, max_batch_size=1, max_queue=1), [(ids, Sampling(max_tokens=12))])[0]
    engine = on(True, max_batch_size=2, max_queue=2)
    sampling = Sampling(max_tokens=12, stop_ids=frozenset({free[6]}))
    assert answers(engine, [(ids, sampling)])[0] == free[: free.index(free[6])]
    assert answers(engine, [(ids, Sampling(max_tokens=12))])[0] == free, "what it left behind is found, and right"


def test_answers_that_give_way_to_others_come_out_the_same(on, model) -> None:
    size = KVCache.block_bytes(model.config, num_extra_layers=0, dtype=torch.float32)
    settings = {"max_batch_size": 12, "max_queue": 40, "max_kv_bytes": 14 * size}
    requests = [(ids, Sampling(max_tokens=15)) for ids in many_prompts()]
    engine = on(True, **settings)
    assert answers(engine, requests) == answers(on(False, **settings), requests)
    assert engine.stats().preemptions


def test_rows_that_fill_up_write_nothing(on) -> None:
    engine = on(True, max_batch_size=16, max_queue=1)
    cache = engine._cache
    cache.keys.fill_(7.0)
    cache.values.fill_(7.0)
    answers(engine, [(ids, Sampling(max_tokens=9)) for ids in many_prompts(5)])  # with three rows to fill up
    num_written = (cache.keys[0] != 7.0).flatten(1, 2).any(dim=1).sum().item()  # places
    assert num_written == engine.stats().computed_tokens + engine.stats().reused_tokens


def test_a_row_with_a_delta_joins_those_of_the_base(on, model) -> None:
    delta = trained(model, LoraConfig(rank=4), seed=1)
    results = []
    for decodes in (True, False):
        engine = on(decodes, max_batch_size=4, max_queue=1)
        tuned = engine.add_delta(delta)
        tokens, reasons = {}, {}
        prompts = many_prompts(3)
        for ids in prompts[:2]:
            engine.add_request(ids, Sampling(max_tokens=16))
        for step in range(20):
            if step == 5:
                engine.add_request(prompts[2], Sampling(max_tokens=5), tuned)
            collect(engine.step(), tokens, reasons)
        assert not engine.has_work
        results.append(tokens)
    assert results[0] == results[1]


@pytest.mark.parametrize("max_rows", [1, 5, 64, 100, 256])
def test_every_number_of_rows_has_a_step_that_is_little_larger(max_rows) -> None:
    counts = row_counts(max_rows)
    assert counts == sorted(set(counts)) and counts[-1] >= max_rows and counts[:3] == [1, 2, 4]
    for rows in range(1, max_rows + 1):
        count = next(count for count in counts if count >= rows)
        assert count < rows + max(2, rows / 2) or count <= 8 or count - rows < 8


@pytest.mark.slow
def test_the_gpus_kernels_answer_as_torch_does_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when a kernel is defined, so: a process of its own
    script = Path(__file__).with_name("interpreted_engine.py")
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["int8_weight", "int8_dynamic"])
def test_on_a_gpu_an_int8_model_decodes_in_all_batch_sizes_as_without_recording(model, scheme) -> None:
    quantized = copy.deepcopy(model).cuda()
    quantize(quantized, QuantizationConfig.model_validate({"scheme": scheme}))
    requests = [(ids, Sampling(max_tokens=8)) for ids in many_prompts(20)]
    for batch_size in (1, 3, 5, 20):
        settings = {"max_batch_size": batch_size, "max_queue": 20, "max_extra_blocks": 0, "int8_head": True}
        ours = answers(Engine(quantized, **settings), requests)
        expected = answers(Engine(quantized, kernels="torch", **settings), requests)
        same = sum(one == other for one, other in zip(ours, expected, strict=True))
        assert same >= 18, "a rounding may fall to the other side"


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("length", [10, 300, 1000])
def test_on_a_gpu_attention_matches_torch_split_and_whole(length) -> None:
    from app.engine.kernels.paged_attention import PagedAttention

    torch.manual_seed(0)
    device = torch.device("cuda")
    blocks = -(-length // BLOCK_SIZE)
    for overlaps in (False, torch.cuda.get_device_capability() >= (9, 0)):
        attention = PagedAttention(max_rows=2, num_heads=12, head_width=64, device=device, overlaps=overlaps)
        keys = torch.randn(2 * blocks, 12, 64, BLOCK_SIZE, device=device)
        values = torch.randn(2 * blocks, 12, BLOCK_SIZE, 64, device=device)
        tables = torch.randperm(2 * blocks, device=device).int().view(2, blocks)
        q, k, v = (torch.randn(2, 12, 64, device=device) for _ in range(3))
        seen = torch.tensor([length, length // 2], dtype=torch.int32, device=device)
        for _ in range(3):
            out = torch.full_like(q, float("nan"))
            attention.attend_new(q, k, v, keys, values, out, tables=tables, seen=seen)
            for row, count in enumerate(seen.tolist()):
                held_keys = keys[tables[row].long()].permute(1, 0, 3, 2).flatten(1, 2)[:, :count]
                held_values = values[tables[row].long()].permute(1, 0, 2, 3).flatten(1, 2)[:, :count]
                torch.testing.assert_close(held_keys[:, -1], k[row])
                expected = F.scaled_dot_product_attention(q[row].unsqueeze(1), held_keys, held_values).squeeze(1)
                torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-4)
