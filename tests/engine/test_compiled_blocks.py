"""All blocks in one call beside one kernel after the other, which must be the same to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_mixed_deltas import METHODS, trained

from app.engine.engine import Engine
from app.engine.kernels import _compiled
from app.engine.kernels.products import products
from app.engine.runner import Runner
from app.engine.sampling import Sampling
from app.models.checkpoints import load_decoder
from app.models.decoder import Decoder
from app.models.quantization import QuantizationConfig, quantize
from app.models.quantization.layer import QuantizedLinear

PROMPTS = [[5, 6, 7], list(range(1, 30)), [9], list(range(40, 60))]


@pytest.fixture(params=["fp32", "bf16", "int8", "int8 of bf16", "nf4", "nf4 of bf16"])
def engine(request: pytest.FixtureRequest, reference: Any, tmp_path: Path) -> Engine:
    if _compiled() is None:
        pytest.skip("no C compiler on this machine")
    kind, ours = request.param, products()
    if kind != "fp32" and not (ours and (ours.of_bytes if "int8" in kind else ours.of_bf16)):
        pytest.skip(f"this processor has no products of {kind}")
    reference.save_pretrained(tmp_path)
    model = load_decoder(tmp_path).requires_grad_(False)
    if "bf16" in kind:
        model = model.bfloat16()
    if kind.startswith(("int8", "nf4")):
        quantize(model, QuantizationConfig.model_validate({"scheme": "int8_dynamic" if "int8" in kind else "nf4"}))
    return Engine(model, max_batch_size=4, kv_dtype="int8" if kind == "int8" else "auto", reuse_prefixes=False)


def calls_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled, with each call, with how many blocks it runs."""
    compiled = engine._runner._compiled_blocks
    assert compiled is not None
    calls: list[int] = []
    ran = compiled.run
    monkeypatch.setattr(
        compiled,
        "run",
        lambda ids, places, count, **of_step: (calls.append(count), ran(ids, places, count, **of_step))[1],
    )
    return calls


def logits_of(engine: Engine, monkeypatch: pytest.MonkeyPatch, deltas: list[str | None]) -> list[torch.Tensor]:
    """Of every step, while some prompts are read and others are answered."""
    seen: list[torch.Tensor] = []
    run = Runner.run

    def recording(self: Runner, sequences: Any) -> Any:
        sampling, logits = run(self, sequences)
        seen.append(logits.clone())
        return sampling, logits

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", recording)
        for prompt, delta in zip(PROMPTS, deltas, strict=False):
            engine.add_request(prompt, Sampling(max_tokens=6), delta)
            engine.step()
        while engine.has_work:
            engine.step()
    return seen


@pytest.mark.parametrize(
    "names",
    [
        [None],
        [None] * 4,
        ["lora"],
        ["lora", None, "lora of another rank", "lora"],
        ["lora of another rank", "prefix", None, "lora of another rank"],
    ],
    ids=str,
)
def test_logits_are_those_of_one_kernel_after_the_other(model: Decoder, engine, monkeypatch, names) -> None:
    calls = calls_of(engine, monkeypatch)
    deltas = {name: engine.add_delta(trained(model, METHODS[name], seed=3)) for name in set(names) - {None}}
    requests = [deltas.get(name) for name in names]
    fast = logits_of(engine, monkeypatch, requests)
    assert calls, "no step went through it"
    engine._runner._compiled_blocks = None
    slow = logits_of(engine, monkeypatch, requests)
    assert len(fast) == len(slow)
    for one, other in zip(fast, slow, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["adapter", "bitfit", "extra block", "dora"])
def test_what_is_more_than_a_low_rank_update_goes_kernel_by_kernel(model: Decoder, engine, monkeypatch, name) -> None:
    if name == "bitfit" and any(isinstance(module, QuantizedLinear) for module in engine.deltas.model.base.modules()):
        pytest.skip("bitfit is not for rounded weights")
    calls = calls_of(engine, monkeypatch)
    delta = engine.add_delta(trained(model, METHODS[name], seed=3))
    logits_of(engine, monkeypatch, [delta, delta])
    assert not calls


def test_a_loras_bytes_are_also_those_of_the_kernels_own_copy(model: Decoder) -> None:
    if _compiled() is None:
        pytest.skip("no C compiler on this machine")
    variant = Engine(model).prepare_delta(trained(model, METHODS["lora"], seed=3))
    layers: Any = variant.layers.values()
    assert variant.num_bytes == sum(layer.lora_a.nbytes + 2 * layer.lora_b.nbytes for layer in layers), "B, transposed"
