"""The compiled kernels beside torch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from app.config import LoraConfig
from app.engine import kernels as kernels_module
from app.engine.engine import Engine
from app.engine.kernels import Kernels, _compiled, kernels_for
from app.methods.lora import LoraLinear
from app.models.decoder import DecoderConfig


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    found = _compiled()
    if found is None:
        pytest.skip("no C compiler on this machine")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (6, 2, 16), (3, 1, 256)])
def test_attention_over_scattered_blocks(compiled, dtype, heads, kv_heads, width) -> None:
    draw = torch.Generator().manual_seed(0)
    seen = torch.tensor([1, 15, 16, 17, 200, 33])
    rows = len(seen)
    tables = torch.randperm(rows * 13, generator=draw).view(rows, 13).int()
    keys = torch.full((rows * 13, kv_heads, width, 16), float("nan")).to(dtype)  # what nobody may look at
    values = torch.full((rows * 13, kv_heads, 16, width), float("nan")).to(dtype)
    q = torch.randn(rows, heads, width, generator=draw).transpose(0, 1)
    expected = torch.empty(rows, heads, width)
    for row, length in enumerate(seen.tolist()):
        k, v = (torch.randn(length, kv_heads, width, generator=draw) for _ in range(2))
        blocks = tables[row, torch.arange(length) // 16].long()
        compiled.write(k, v, keys, values, blocks=blocks, offsets=torch.arange(length) % 16)
        k, v = (part.to(dtype).float().transpose(0, 1).unsqueeze(0) for part in (k, v))
        expected[row] = F.scaled_dot_product_attention(q[None, :, row : row + 1], k, v, enable_gqa=True)[0, :, 0]
    out = torch.zeros(rows, heads, width)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    compiled.attend(
        q, keys, values, out.transpose(0, 1), rows=order, seen=seen[order], tables=tables, table_of_row=order
    )
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6)


def test_bf16_is_rounded_to_the_nearest(compiled) -> None:
    k = torch.randn(16, 1, 16, generator=torch.Generator().manual_seed(2))
    k[0, 0, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -0.0])
    keys, values = torch.zeros(1, 1, 16, 16).bfloat16(), torch.zeros(1, 1, 16, 16).bfloat16()
    compiled.write(k, k, keys, values, blocks=torch.zeros(16, dtype=torch.long), offsets=torch.arange(16))
    assert torch.equal(values[0, 0], k[:, 0].bfloat16()) and torch.equal(keys[0, 0].T, k[:, 0].bfloat16())


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (50, 70)])
def test_the_updates_of_many_loras(compiled, inputs, outputs) -> None:
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs)
    layers = [LoraLinear(base, LoraConfig(rank=rank, alpha=16)) for rank in (1, 8, 33)]
    for layer in layers:
        nn.init.normal_(layer.lora_b)
    x = torch.randn(1, 9, inputs)
    spans = [slice(0, 2), slice(3, 4), slice(4, 9)]  # row 2 is the base's
    with torch.no_grad():
        y = base(x)
        expected = y.clone()
        for rows, layer in zip(spans, layers, strict=True):
            expected[:, rows] = layer(x[:, rows])
        compiled.lora_rows(list(zip(spans, layers, strict=True))).add(x[0], y[0])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (50, 71), (768, 1001)])
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_times_a_matrix(compiled, inputs, outputs, bias) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(1, 1, inputs)
    with torch.no_grad():
        result = compiled.multiply_row(x, linear.weight, linear.bias)
        torch.testing.assert_close(result, linear(x), rtol=1e-5, atol=1e-5)


def test_shapes_and_devices_that_the_kernels_do_not_know_go_to_torch() -> None:
    def known(width: int, device: str, dtype: torch.dtype) -> bool:
        config = DecoderConfig(10, 16, num_layers=1, num_heads=1, width=width, mlp_width=8)
        return kernels_for(config, cache_dtype=dtype, dtype=torch.float32, device=torch.device(device)) is not None

    assert not known(24, "cpu", torch.float32) and not known(272, "cpu", torch.float32)
    assert not known(32, "meta", torch.float32) and not known(32, "cpu", torch.float16)


def test_without_a_compiler_the_engine_says_so_and_computes_with_torch(model, monkeypatch, caplog, tmp_path) -> None:
    _compiled.cache_clear()
    monkeypatch.setattr(kernels_module.shutil, "which", lambda name: None)
    try:
        assert Engine(model)._runner.kernels is None
        assert "no C compiler" in caplog.text
    finally:
        _compiled.cache_clear()


def test_a_compiler_that_fails_costs_a_warning(model, monkeypatch, caplog, tmp_path: Path) -> None:
    _compiled.cache_clear()
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho this is no compiler >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        assert Engine(model)._runner.kernels is None
        assert "this is no compiler" in caplog.text
        assert not list((tmp_path / "pacos").iterdir()), "nothing half made is left"
    finally:
        _compiled.cache_clear()
