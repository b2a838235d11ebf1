"""Deltas of every technique in one batch."""

import copy

import pytest
import torch
from single import alone, collect, drain

from app.config import (
    AdapterConfig,
    BitFitConfig,
    ComposedConfig,
    ExtraBlockConfig,
    FullConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from app.engine.deltas import DeltasFull, UnknownDelta
from app.engine.engine import Engine, EngineSettings
from app.engine.events import InvalidRequest
from app.engine.front import EngineFront
from app.engine.kv_cache import KVCache
from app.engine.sampling import Sampling
from app.errors import UserError
from app.methods import apply_method
from app.methods.delta import Delta, apply_delta
from app.models.decoder import Decoder
from app.models.quantization import QuantizationConfig, quantize
from app.models.quantization.int8 import IntegerLinear

METHODS = {
    "lora": LoraConfig(rank=4),
    "lora of another rank": LoraConfig(rank=9, targets=("attn.qkv", "mlp.down"), rank_stabilized=True),
    "dora": LoraConfig(rank=3, dora=True),
    "adapter": AdapterConfig(size=8),
    "adapter of another size": AdapterConfig(size=20, placement="mlp"),
    "prefix": PrefixConfig(length=5),
    "longer prefix": PrefixConfig(length=18),
    "prompt": PromptConfig(length=3),
    "bitfit": BitFitConfig(),
    "extra block": ExtraBlockConfig(),
    "two extra blocks": ExtraBlockConfig(count=2),
    "extra block, lora and prefix": ComposedConfig(
        parts=(ExtraBlockConfig(), LoraConfig(rank=2), PrefixConfig(length=4))
    ),
    "lora, bitfit and adapter": ComposedConfig(parts=(LoraConfig(rank=2), BitFitConfig(), AdapterConfig(size=4))),
}
SAMPLING = Sampling(max_tokens=10)


def some(prompts: list[list[int]]) -> list[list[int]]:
    """Those that fit behind the longest prefix; of 5, 1, 17, 2 and 23 tokens."""
    return [prompts[number] for number in (0, 1, 2, 4, 6)]


def trained(model: Decoder, method, *, seed: int) -> Delta:
    """A delta whose weights are far from where training starts."""
    changed = copy.deepcopy(model)
    apply_method(changed, method)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: p.detach()
        + 0.3 * torch.randn(p.shape, generator=generator) * (p.std() if p.numel() > 1 and p.std() > 0 else 1)
        for name, p in changed.named_parameters()
        if p.requires_grad
    }
    return Delta(method, weights, {"base_hash": "the base"})


def with_delta(model: Decoder, delta: Delta) -> Decoder:
    changed = copy.deepcopy(model)
    apply_delta(changed, delta)
    return changed.requires_grad_(False)


@pytest.fixture(scope="module")
def deltas(model) -> dict[str, Delta]:
    return {name: trained(model, method, seed=number) for number, (name, method) in enumerate(METHODS.items())}


@pytest.fixture(scope="module")
def expected(model, deltas, prompts) -> dict[str, list[list[int]]]:
    """Each delta's answers from a model and an engine of its own."""
    answers = {
        name: [alone(with_delta(model, d), ids, SAMPLING) for ids in some(prompts)] for name, d in deltas.items()
    }
    return {"": [alone(model, ids, SAMPLING) for ids in some(prompts)], **answers}


def test_the_deltas_answer_unlike_each_other(expected):
    assert len({str(answers) for answers in expected.values()}) == len(METHODS) + 1


@pytest.mark.parametrize("reuse", [True, False], ids=["prefixes reused", "prefixes computed"])
def test_each_row_of_a_mixed_batch_has_the_tokens_of_its_delta_alone(model, deltas, expected, prompts, kernels, reuse):
    settings = EngineSettings(
        max_batch_size=40, max_queue=200, max_step_tokens=64, max_extra_blocks=2, kernels=kernels, reuse_prefixes=reuse
    )
    engine = Engine(model, settings)
    hashes = {"": None} | {name: engine.add_delta(delta) for name, delta in deltas.items()}
    asked = {}
    for index in range(5):  # the deltas take turns, so that neighbours differ
        for name, delta in hashes.items():
            asked[engine.add_request(some(prompts)[index], SAMPLING, delta)] = (name, index)
    tokens, _ = drain(engine)
    for request_id, (name, index) in asked.items():
        assert tokens[request_id] == expected[name][index], f"{name}, prompt {index}"
    assert engine.stats().free_blocks == engine.stats().blocks
    assert alone(model, prompts[0], SAMPLING) == expected[""][0], "the base's weights are as they were"


def test_over_a_base_in_bf16_the_deltas_answer_nearly_as_in_fp32(model, deltas, expected, prompts, kernels):
    engine = Engine(
        copy.deepcopy(model).bfloat16(), max_batch_size=32, max_queue=200, max_extra_blocks=2, kernels=kernels
    )
    asked = {}
    for name, delta in deltas.items():
        loaded = engine.add_delta(delta)
        asked |= {engine.add_request(some(prompts)[index], SAMPLING, loaded): (name, index) for index in range(5)}
    tokens, _ = drain(engine)
    for name in deltas:
        same = [
            tokens[asked_id][0] == expected[name][index][0] for asked_id, (of, index) in asked.items() if of == name
        ]
        assert sum(same) >= 3, f"{name}: {same}"


def test_a_second_round_finds_what_the_first_computed_and_mixes_nothing_up(model, deltas, expected, prompts):
    engine = Engine(model, max_batch_size=32, max_queue=100, max_extra_blocks=2)
    hashes = {"": None} | {name: engine.add_delta(delta) for name, delta in deltas.items()}
    for _ in range(2):
        before = engine.stats().reused_tokens
        asked = {engine.add_request(some(prompts)[4], SAMPLING, delta): name for name, delta in hashes.items()}
        tokens, _ = drain(engine)
        assert all(tokens[request_id] == expected[name][4] for request_id, name in asked.items())
    assert engine.stats().reused_tokens - before >= 14 * len(hashes), "a block of each delta's own"


def test_deltas_over_a_quantized_base_answer_as_alone(reference, model, prompts, tmp_path):
    quantized = copy.deepcopy(model)
    quantize(quantized, QuantizationConfig.model_validate({"scheme": "int8_dynamic"}))
    methods = [METHODS["lora"], METHODS["adapter"], METHODS["prefix"], METHODS["extra block"]]
    deltas = [trained(quantized, method, seed=number) for number, method in enumerate(methods)]
    engine = Engine(quantized, max_batch_size=8, max_queue=8)
    asked = {engine.add_request(prompts[2], SAMPLING, engine.add_delta(delta)): delta for delta in deltas}
    tokens, _ = drain(engine)
    for request_id, delta in asked.items():
        assert tokens[request_id] == alone(with_delta(quantized, delta), prompts[2], SAMPLING)


@pytest.mark.parametrize("scheme", [None, "int8_dynamic"])
def test_loras_of_all_rows_are_added_together(model, prompts, kernels, scheme, monkeypatch):
    """Not one after the other, which took most of a step over an int8 base."""
    if kernels == "torch":
        pytest.skip("one after the other is torch's way")

    def one_by_one(*args):
        raise AssertionError("a LoRA is added by itself")

    base = copy.deepcopy(model)
    if scheme is not None:
        quantize(base, QuantizationConfig.model_validate({"scheme": scheme}))
    engine = Engine(base, max_batch_size=8, max_queue=8, kernels=kernels)
    if engine._runner.kernels is None:
        pytest.skip("no compiled kernels")
    monkeypatch.setattr("app.engine.site.updated", one_by_one)
    hashes = [engine.add_delta(trained(model, LoraConfig(rank=4), seed=seed)) for seed in (1, 2)]
    for number, ids in enumerate(some(prompts)):
        engine.add_request(ids, SAMPLING, hashes[number % 2])
    while engine.has_work:
        engine.step()


def test_a_delta_whose_rows_are_no_numbers_touches_nobody_else(model, deltas, expected, prompts, kernels):
    engine = Engine(model, max_batch_size=2, max_queue=8, kernels=kernels)
    broken = Delta(deltas["lora"].method, {name: w * torch.nan for name, w in deltas["lora"].weights.items()}, {})
    with pytest.raises(UserError, match="holds NaN"):
        engine.add_delta(broken)
    lora = engine.add_delta(deltas["lora"])
    for layer in engine.deltas.get(lora).layers.values():  # past the check, as a sum that overflows would be
        for factor in (layer.lora_b, *getattr(layer, "factors_for_kernels", ())):
            factor.data.fill_(torch.nan)
    engine.add_request(prompts[3], SAMPLING, lora)  # of more tokens than those beside it; the cache's first block
    asked = [engine.add_request(ids, SAMPLING) for ids in some(prompts)]
    tokens, _ = drain(engine)
    assert [tokens[request_id] for request_id in asked] == expected[""]


def test_what_stands_where_nobody_has_written_is_not_seen(model, prompts, kernels, monkeypatch):
    monkeypatch.setattr("app.engine.step_cache._FEW_ROWS", 8)
    monkeypatch.setattr("app.engine.step_cache._FEW_ROWS_OF_CPU", 8)
    block = KVCache.block_bytes(model.config, num_extra_layers=1, dtype=torch.float32)
    engine = Engine(model, max_batch_size=2, max_queue=8, max_kv_bytes=3 * block, kernels=kernels)
    engine._cache.keys.fill_(torch.nan)
    engine._cache.values.fill_(torch.nan)
    longer = prompts[2][:16] + prompts[7]  # of 28 tokens, of which 12 are new when it comes second
    for ids in (prompts[2], longer, prompts[1]):
        request_id = engine.add_request(ids, SAMPLING)
        tokens, _ = drain(engine)
        assert tokens[request_id] == alone(model, ids, SAMPLING)
    assert engine.stats().reused_tokens == 16


def test_deltas_come_and_go_while_requests_run(model, deltas, expected, prompts):
    one_too_few = sum(Engine(model).prepare_delta(deltas[name]).num_bytes for name in ("lora", "adapter")) - 1
    engine = Engine(model, max_batch_size=8, max_queue=8, max_delta_bytes=one_too_few)
    tokens, reasons = {}, {}
    lora = engine.add_delta(deltas["lora"])
    first = engine.add_request(prompts[0], SAMPLING, lora)
    collect(engine.step(), tokens, reasons)
    with pytest.raises(DeltasFull, match="1 deltas are pinned or in use"):
        engine.add_delta(deltas["adapter"])
    while engine.has_work:
        collect(engine.step(), tokens, reasons)
    assert tokens[first] == expected["lora"][0]
    adapter = engine.add_delta(deltas["adapter"], pin=True)
    assert engine.stats().deltas == 1, "the one that nobody used made room"
    with pytest.raises(UnknownDelta):
        engine.add_request(prompts[0], SAMPLING, lora)
    with pytest.raises(DeltasFull):
        engine.add_delta(deltas["lora"])
    engine.deltas.unpin(adapter)
    assert engine.add_delta(deltas["lora"]) == lora
    assert engine.deltas.loaded == [lora] and engine.stats().delta_bytes <= one_too_few


def test_the_least_recently_used_goes_first(model, deltas):
    names = ["lora", "adapter", "dora"]
    sizes = {name: Engine(model).prepare_delta(deltas[name]).num_bytes for name in names}
    engine = Engine(model, max_delta_bytes=sum(sizes.values()) - 1)
    lora, adapter = engine.add_delta(deltas["lora"]), engine.add_delta(deltas["adapter"])
    engine.deltas.get(lora)
    dora = engine.add_delta(deltas["dora"])
    assert engine.deltas.loaded == [lora, dora] and adapter not in engine.deltas.loaded


def test_what_is_unpinned_is_the_next_to_go_and_may_be_gone(model, deltas):
    names = ["lora", "adapter", "dora"]
    sizes = {name: Engine(model).prepare_delta(deltas[name]).num_bytes for name in names}
    engine = Engine(model, max_delta_bytes=sum(sizes.values()) - 1)
    lora, adapter = engine.add_delta(deltas["lora"]), engine.add_delta(deltas["adapter"], pin=True)
    engine.deltas.unpin(adapter)
    assert engine.deltas.loaded == [adapter, lora]
    dora = engine.add_delta(deltas["dora"])
    assert engine.deltas.loaded == [lora, dora]
    engine.deltas.unpin(adapter)
    assert engine.deltas.loaded == [lora, dora]


def test_a_prompt_over_an_int8_base_leaves_no_copy_of_the_base_behind(model):
    base = copy.deepcopy(model)
    quantize(base, QuantizationConfig.model_validate({"scheme": "int8_dynamic"}))
    method = ComposedConfig(parts=(LoraConfig(rank=2), PromptConfig(length=3)))
    variant = Engine(base).prepare_delta(trained(base, method, seed=0))
    below = [module for layer in variant.layers.values() for module in layer.modules()]
    integers = [module for module in below if isinstance(module, IntegerLinear)]
    assert len(integers) == 12 and all(module._product is None for module in integers)


def test_low_rank_updates_are_counted_in_the_kernels_form_too(model, prompts, kernels):
    """Beside other techniques as well, where they are made for each layer by itself."""
    engine = Engine(model, kernels=kernels)
    method = ComposedConfig(parts=(LoraConfig(rank=2, targets=("attn.qkv",)), AdapterConfig(size=4, placement="mlp")))
    delta = trained(model, method, seed=0)
    variant = engine.prepare_delta(delta)
    stored = sum(weight.nbytes for weight in delta.weights.values())
    turned = sum(weight.nbytes for name, weight in delta.weights.items() if name.endswith("lora_b"))
    assert turned and variant.num_bytes == stored + (0 if engine._runner.kernels is None else turned)
    engine.add_request(prompts[0], SAMPLING, engine.add_delta(variant))
    drain(engine)
    factors = [
        factor
        for layer in variant.layers.values()
        for factor in getattr(layer, "factors_for_kernels", ())
        if all(factor.data_ptr() != weight.data_ptr() for weight in layer.parameters())
    ]
    assert stored + sum(factor.nbytes for factor in factors) == variant.num_bytes


def test_what_cannot_share_a_batch_is_refused(model, deltas):
    engine = Engine(model, max_extra_blocks=1)
    with pytest.raises(UserError, match="'full' trains the base's own weights"):
        engine.add_delta(trained(model, FullConfig(), seed=0))
    with pytest.raises(UserError, match="adds 2 blocks.*set max_extra_blocks=2, .*generator.max_extra_blocks=2"):
        engine.add_delta(deltas["two extra blocks"])
    with pytest.raises(UserError, match="larger|more than max_delta_bytes=10"):
        Engine(model, max_delta_bytes=10).add_delta(deltas["lora"])
    wrong = Delta(METHODS["lora"], dict(deltas["adapter"].weights), {})
    with pytest.raises(UserError, match="does not fit this model"):
        engine.add_delta(wrong)
    with pytest.raises(UnknownDelta):
        engine.add_request([1], SAMPLING, "abc")
    assert not engine.has_work and engine.stats().deltas == 0


def test_a_prefix_that_the_cache_cannot_hold_is_refused_with_its_delta(model, deltas):
    block = KVCache.block_bytes(model.config, num_extra_layers=1, dtype=torch.float32)
    front = EngineFront(Engine(model, max_kv_bytes=block))
    try:
        with pytest.raises(UserError, match=f"prefix of 18 tokens.*2 blocks.*max_kv_bytes={block} holds 1; raise it"):
            front.load_delta(deltas["longer prefix"])
    finally:
        front.shutdown()
    engine = Engine(model, max_kv_bytes=2 * block)
    longer = engine.add_delta(deltas["longer prefix"])
    with pytest.raises(InvalidRequest, match="may take 15 tokens behind a prefix of 18; the KV cache holds 32 in all"):
        engine.add_request([1] * 5, SAMPLING, longer)
