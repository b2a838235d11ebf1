"""Packed products beside plain ones, and the few shapes that oneDNN gets to see."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_mixed_deltas import METHODS, trained
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from app.engine import packing
from app.engine.engine import Engine, EngineSettings
from app.engine.kernels import Kernels, _compiled
from app.engine.packing import AlignedHead, PackedInt8, PackedLinear, PackedNf4, can_pack, pack, round_up
from app.engine.sampling import Sampling
from app.models.decoder import Decoder
from app.models.quantization import QuantizationConfig, quantize
from app.models.quantization.int8 import Int8Dynamic
from app.models.quantization.nf4 import Nf4Linear

pytestmark = pytest.mark.skipif(not can_pack(torch.float32, torch.device("cpu")), reason="this torch has no oneDNN")


class Rows(TorchDispatchMode):
    """How many rows the packed products have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "linear_pointwise" in str(func):
            self.seen.add(args[0].shape[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_batch", [False, True])
def test_a_packed_layer_multiplies_as_the_plain_one(with_batch: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80).requires_grad_(False)
    packed = PackedLinear(linear, _compiled())
    with torch.inference_mode():
        for count in (1, 2, 8, 64, 65, 300):
            x = torch.randn((1, count, 48) if with_batch else (count, 48))
            y = packed(x)
            assert y.is_contiguous(), "the compiled kernels read it by its address"
            torch.testing.assert_close(y, linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_features", [64, 48])
def test_a_packed_int8_layer_computes_what_the_layer_does(dtype: torch.dtype, bias: bool, in_features: int) -> None:
    kernels = needed_kernels()
    torch.manual_seed(0)
    layer = Int8Dynamic(in_features, 80, bias=bias)
    layer.store(torch.randn(80, in_features))
    if bias:
        layer.bias = torch.randn(80)
    if not PackedInt8.suits(layer):
        pytest.skip("another kernel than oneDNN's multiplies integers on this machine")
    packed = PackedInt8(layer, kernels)
    with torch.inference_mode():
        for count in (1, 5, 64):
            x = torch.randn(1, count, in_features).to(dtype)
            y = packed(x)
            assert y.is_contiguous() and y.dtype == dtype
            torch.testing.assert_close(y, layer(x), atol=1e-4, rtol=1e-5 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_features", [64, 96, 288])
def test_a_packed_nf4_layer_computes_what_the_layer_does(dtype: torch.dtype, in_features: int) -> None:
    """96 and 288: blocks of 64 begin in the middle of a row."""
    kernels = needed_kernels()
    layer = nf4_layer(in_features)
    packed = pack(layer, kernels, is_packed=True)
    if not PackedNf4.suits(layer):
        assert packed is layer
        pytest.skip("this processor has no products of bf16")
    with torch.inference_mode():
        for count in (1, 5, 64):
            x = torch.randn(1, count, in_features).to(dtype)
            y = packed(x)
            assert y.shape == (1, count, 80) and y.is_contiguous() and y.dtype == dtype
            largest = float(layer(x.float()).abs().max())
            torch.testing.assert_close(y.float(), layer(x.float()), atol=largest * 2**-7, rtol=2**-7)


def test_an_nf4_layer_whose_rows_end_in_the_middle_of_a_scale_stays() -> None:
    layer = nf4_layer(48)
    assert pack(layer, needed_kernels(), is_packed=True) is layer


def nf4_layer(in_features: int) -> Nf4Linear:
    torch.manual_seed(0)
    layer = Nf4Linear(in_features, 80, bias=True)
    layer.store(torch.randn(80, in_features))
    layer.bias = torch.randn(80)
    return layer


def needed_kernels() -> Kernels:
    found = _compiled()
    if found is None:
        pytest.skip("no C compiler on this machine")
    return found


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_shows_few_numbers_of_rows_to_onednn(
    model: Decoder, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed_kernels()
    model = copy.deepcopy(model)
    if precision == "int8":
        quantize(model, QuantizationConfig.model_validate({"scheme": "int8_dynamic"}))
        monkeypatch.setattr(packing, "_products_of_bytes", lambda: None)  # which would multiply any number of rows
    engine = Engine(model, EngineSettings(max_batch_size=40, max_queue=100, max_step_tokens=200))
    for number in range(40):  # prompts and answers of many lengths
        ids = [number % 7 + 1] * (1 + 3 * number % 30)
        engine.add_request(ids, Sampling(max_tokens=1 + number % 13))
    with Rows() as rows:
        while engine.has_work:
            engine.step()
    assert rows.seen and rows.seen <= {round_up(count) for count in range(1, 300)}
    assert len(rows.seen) < 20


def test_rows_are_rounded_up_to_few_numbers_at_little_cost() -> None:
    rounded = [round_up(count) for count in range(1, 1025)]
    assert len(set(rounded)) < 30
    assert all(count <= padded for count, padded in enumerate(rounded, start=1))
    assert all(padded - count < max(8, count / 2) for count, padded in enumerate(rounded, start=1))


def test_a_head_filled_up_makes_the_logits_of_the_vocabulary_alone() -> None:
    weight, x = torch.randn(1003, 32), torch.randn(2, 5, 32)
    head = AlignedHead(weight)
    logits = head(x)
    torch.testing.assert_close(logits, x @ weight.T)
    assert logits.shape == (2, 5, 1003) and logits.stride(1) % 64 == 0
    assert torch.equal(head.weight, weight) and head.weight.is_contiguous()  # as kernels of ours read it


@pytest.mark.parametrize("technique", [None, "lora"])
def test_the_last_block_ends_with_the_rows_that_sample(
    model: Decoder, technique: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed_kernels()
    prepare, rows = Kernels.prepare, []

    def seen(self: Kernels, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        rows.append(len(x))
        return prepare(self, x, *rest, **named)

    monkeypatch.setattr(Kernels, "prepare", seen)
    engine = Engine(model)
    delta = None if technique is None else engine.add_delta(trained(model, METHODS[technique], seed=1))
    engine.add_request(list(range(1, 21)), Sampling(max_tokens=2), delta)
    engine.step()
    assert len(rows) == 4 * model.config.num_layers + 1 and min(rows[:-4]) >= 20
    # after the last attention: the output's product, the MLP's two, and the norm before the head
    assert rows[-4:] == [1] * 4 if technique is None else min(rows[-4:]) >= 20, "a delta's rows have to be found"
