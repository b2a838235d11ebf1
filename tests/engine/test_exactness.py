"""Greedy answers beside `transformers`, whatever the engine does to be fast."""

import copy
import random

import pytest
import torch
from single import drain

from app.engine.engine import Engine, EngineSettings
from app.engine.kernels import _compiled
from app.engine.kv_cache import KVCache
from app.engine.sampling import Sampling
from app.models.quantization import QuantizationConfig, quantize

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def many() -> list[list[int]]:
    """200 prompts; most begin like another."""
    draw = random.Random(5)
    beginnings = [[draw.randrange(1, 97) for _ in range(length)] for length in (16, 20, 33)]
    prompts = []
    for number in range(200):
        beginning = beginnings[number % 4] if number % 4 < 3 else []
        prompts.append(beginning + [draw.randrange(1, 97) for _ in range(draw.randint(1, 30 if not beginning else 3))])
    return prompts


@pytest.fixture(scope="module")
def expected(reference, many) -> list[list[int]]:
    by_length: dict[int, list[int]] = {}  # no prompt is padded
    for number, ids in enumerate(many):
        by_length.setdefault(len(ids), []).append(number)
    answers: list[list[int]] = [[]] * len(many)
    for length, numbers in by_length.items():
        ids = torch.tensor([many[number] for number in numbers])
        output = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        for number, row in zip(numbers, output, strict=True):
            answers[number] = row[length:].tolist()
    return answers


@pytest.mark.parametrize("blocks", [None, 30], ids=["ample memory", "preempted"])
@pytest.mark.parametrize("reuse", [True, False], ids=["prefixes reused", "prefixes computed"])
def test_200_prompts_together_get_the_tokens_of_transformers(model, many, expected, kernels, reuse, blocks):
    size = KVCache.block_bytes(model.config, num_extra_layers=0, dtype=torch.float32)
    settings = EngineSettings(
        max_batch_size=64,
        max_queue=200,
        max_step_tokens=100,
        reuse_prefixes=reuse,
        max_kv_bytes=blocks and blocks * size,
        max_extra_blocks=0,
        kernels=kernels,
    )
    engine = Engine(model, settings)
    request_ids = [engine.add_request(ids, Sampling(max_tokens=MAX_TOKENS)) for ids in many]
    tokens, _ = drain(engine)
    assert [tokens[request_id] for request_id in request_ids] == expected
    stats = engine.stats()
    assert stats.free_blocks == stats.blocks
    assert (stats.preemptions > 10) == (blocks is not None)
    assert (stats.reused_tokens > 1500) == reuse


@pytest.mark.parametrize("scheme", ["int8_weight", "int8_dynamic", "nf4"])
def test_a_quantized_models_batch_has_the_tokens_of_each_alone(reference, many, scheme, tmp_path):
    """And how far they are from full precision's: told, not promised."""
    from app.models.checkpoints import load_decoder

    reference.save_pretrained(tmp_path)
    model = load_decoder(tmp_path)
    quantize(model, QuantizationConfig.model_validate({"scheme": scheme}))
    engine = Engine(model, max_batch_size=16, max_queue=40)
    request_ids = [engine.add_request(ids, Sampling(max_tokens=MAX_TOKENS)) for ids in many[:40]]
    tokens, _ = drain(engine)
    one = Engine(model, max_batch_size=1, max_queue=40)
    alone = [one.add_request(ids, Sampling(max_tokens=MAX_TOKENS)) for ids in many[:40]]
    tokens_alone, _ = drain(one)
    assert [tokens[request_id] for request_id in request_ids] == [tokens_alone[request_id] for request_id in alone]


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_a_rounded_cache_answers_nearly_as_in_fp32(model, many, expected, kernels, kv_dtype):
    engine = Engine(model, EngineSettings(max_batch_size=32, max_queue=200, kv_dtype=kv_dtype, kernels=kernels))
    request_ids = [engine.add_request(ids, Sampling(max_tokens=MAX_TOKENS)) for ids in many[:60]]
    tokens, _ = drain(engine)
    first_tokens = [
        tokens[request_id][0] == answer[0] for request_id, answer in zip(request_ids, expected, strict=False)
    ]
    assert sum(first_tokens) >= 55


def test_a_model_in_bf16_answers_with_the_compiled_kernels_as_with_torch(model, many):
    if _compiled() is None:
        pytest.skip("no C compiler on this machine")
    tokens = {}
    for kernels in ("auto", "torch"):
        halved = copy.deepcopy(model).bfloat16()
        engine = Engine(halved, EngineSettings(max_batch_size=32, max_queue=200, kernels=kernels))
        request_ids = [engine.add_request(ids, Sampling(max_tokens=3)) for ids in many[:60]]
        answers, _ = drain(engine)
        tokens[kernels] = [answers[request_id][0] for request_id in request_ids]
    same = sum(a == b for a, b in zip(tokens["auto"], tokens["torch"], strict=True))
    assert same >= 55, "bf16 rounds a little otherwise on the two ways"
