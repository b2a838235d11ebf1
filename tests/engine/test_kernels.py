"""The compiled kernels beside torch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from app.config import LoraConfig
from app.engine.engine import Engine
from app.engine.kernels import Before, CachedLayer, Kernels, _compiled, kernels_for
from app.engine.kernels.products import products
from app.methods.lora import LoraLinear
from app.models.decoder import DecoderConfig
from app.models.kernels import native, notices


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    found = _compiled()
    if found is None:
        pytest.skip("no C compiler on this machine")
    return found


def empty_layer(num_blocks: int, kv_heads: int, width: int, dtype: torch.dtype) -> CachedLayer:
    """What nobody may look at: not a number, and in bytes the steps are none."""
    fill = 127 if dtype == torch.int8 else float("nan")
    of_keys, of_values = ((width // 4, 16, 4), (4, width, 4)) if dtype == torch.int8 else ((width, 16), (16, width))
    shapes = (num_blocks, kv_heads, *of_keys), (num_blocks, kv_heads, *of_values)
    steps = [torch.full((num_blocks, kv_heads, 16), float("nan")) if dtype == torch.int8 else None for _ in range(2)]
    return CachedLayer(*(torch.full(shape, fill, dtype=dtype) for shape in shapes), *steps)


def as_cached(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` [rows, kv_heads, head_width] as the cache gives it back, in fp32."""
    if dtype != torch.int8:
        return x.to(dtype).float()
    step = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / step).round() * step


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (6, 2, 16), (3, 1, 256)])
def test_attention_over_scattered_blocks(compiled, q_dtype, dtype, heads, kv_heads, width) -> None:
    draw = torch.Generator().manual_seed(0)
    seen = torch.tensor([1, 15, 16, 17, 200, 33])
    rows = len(seen)
    tables = torch.randperm(rows * 13, generator=draw).view(rows, 13).int()
    cached = empty_layer(rows * 13, kv_heads, width, dtype)
    q = torch.randn(rows, heads, width, generator=draw).to(q_dtype).transpose(0, 1)
    expected = torch.empty(rows, heads, width)
    for row, length in enumerate(seen.tolist()):
        k, v = (torch.randn(length, kv_heads, width, generator=draw).to(q_dtype) for _ in range(2))
        blocks = tables[row, torch.arange(length) // 16].long()
        compiled.write(k.transpose(0, 1), v.transpose(0, 1), cached, blocks=blocks, offsets=torch.arange(length) % 16)
        k, v = (as_cached(part, dtype).transpose(0, 1).unsqueeze(0) for part in (k, v))
        query = as_cached(q[:, row], dtype) if dtype == torch.int8 else q[:, row].float()
        expected[row] = F.scaled_dot_product_attention(query[None, :, None], k, v, enable_gqa=True)[0, :, 0]
    out = torch.zeros(rows, heads, width).to(q_dtype)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    compiled.attend(q, cached, out.transpose(0, 1), rows=order, seen=seen[order], tables=tables, table_of_row=order)
    rounding = {"rtol": 2e-5, "atol": 2e-6} if q_dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    if dtype == torch.int8:
        rounding["atol"] = 5e-5  # the weights of values are rounded to 16 bits
    torch.testing.assert_close(out.float(), expected, **rounding)


def test_bf16_is_rounded_to_the_nearest(compiled) -> None:
    k = torch.randn(16, 1, 16, generator=torch.Generator().manual_seed(2))
    k[0, 0, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -0.0])
    keys, values = torch.zeros(1, 1, 16, 16).bfloat16(), torch.zeros(1, 1, 16, 16).bfloat16()
    compiled.write(
        k.transpose(0, 1),
        k.transpose(0, 1),
        CachedLayer(keys, values),
        blocks=torch.zeros(16, dtype=torch.long),
        offsets=torch.arange(16),
    )
    assert torch.equal(values[0, 0], k[:, 0].bfloat16()) and torch.equal(keys[0, 0].T, k[:, 0].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (50, 70)])
def test_the_updates_of_many_loras(compiled, dtype, inputs, outputs) -> None:
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs)
    layers = [LoraLinear(base, LoraConfig(rank=rank, alpha=16)) for rank in (1, 8, 33)]
    for layer in layers:
        nn.init.normal_(layer.lora_b)
    x = torch.randn(1, 9, inputs).to(dtype)
    spans = [slice(0, 2), slice(3, 4), slice(4, 9)]  # row 2 is the base's
    with torch.no_grad():
        y = base(x.float()).to(dtype)
        expected = y.float()
        for rows, layer in zip(spans, layers, strict=True):
            expected[:, rows] += layer(x[:, rows].float()) - base(x[:, rows].float())
        compiled.lora_rows(list(zip(spans, layers, strict=True))).add(x[0], y[0])
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.float(), expected, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (50, 71), (768, 1001)])
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_times_a_matrix(compiled, inputs, outputs, bias) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, outputs, bias=bias), torch.randn(1, 1, inputs)
    with torch.no_grad():
        result = compiled.multiply_row(x, linear.weight, linear.bias)
        torch.testing.assert_close(result, linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 50, 7])
def test_rows_are_rounded_by_a_step_of_their_own(compiled, dtype, width) -> None:
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3] = 0
    x[4, :2] = torch.tensor([63.5, -127.0])  # a tie, and the largest
    integers, steps = compiled.round_rows(x, 127)
    expected = x.float().abs().amax(dim=1).clamp_min(1e-12) / 127
    torch.testing.assert_close(steps, expected, rtol=0, atol=0)
    assert torch.equal(integers.int(), (x.float() / expected.unsqueeze(1)).round().int() + 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 50])
@pytest.mark.parametrize("before", ["nothing", "gelu", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("is_added", [True, False])
def test_rows_are_prepared_for_a_product(compiled, dtype, width, before, is_added) -> None:
    torch.manual_seed(0)
    modules = {"nothing": None, "gelu": "gelu", "layer_norm": nn.LayerNorm(width), "rms_norm": nn.RMSNorm(width)}
    module = modules[before]
    if isinstance(module, nn.Module):
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        module = module.to(dtype)
    x, added = (3 + torch.randn(9, width)).to(dtype), torch.randn(9, width).to(dtype) if is_added else None
    with torch.no_grad():
        total = x if added is None else x + added
        expected = total
        if before == "gelu":
            expected = F.gelu(total, approximate="tanh")
        elif isinstance(module, nn.Module):
            expected = module(total)
        values, integers, steps = compiled.prepare(x, Before(module), added, has_values=True, levels=127)
    torch.testing.assert_close(x, total, rtol=0, atol=0)
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-2}
    torch.testing.assert_close(values, expected, **rounding)
    as_rounded = compiled.round_rows(values, 127)
    assert torch.equal(integers, as_rounded[0]) and torch.equal(steps, as_rounded[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_scaled_back(compiled, dtype, bias) -> None:
    torch.manual_seed(0)
    y, steps, shift = torch.randn(5, 71), torch.rand(5), torch.randn(71) if bias else None
    expected = y * steps.unsqueeze(1) + (0 if shift is None else shift)
    torch.testing.assert_close(compiled.scale_rows(y, steps, shift, dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 15, 16, 50257])
def test_the_first_of_the_largest_is_found(compiled, dtype, width) -> None:
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = -float("inf")
    x[2, width // 2 :] = 9.0
    x[3, -1] = 10.0
    expected = [row.tolist().index(max(row.tolist())) for row in x]
    assert compiled.argmax(x).tolist() == expected


def test_shapes_and_devices_that_the_kernels_do_not_know_go_to_torch() -> None:
    def known(width: int, device: str, dtype: torch.dtype) -> bool:
        config = DecoderConfig(10, 16, num_layers=1, num_heads=1, width=width, mlp_width=8)
        return kernels_for(config, cache_dtype=dtype, dtype=torch.float32, device=torch.device(device)) is not None

    assert not known(24, "cpu", torch.float32) and not known(272, "cpu", torch.float32)
    assert not known(32, "meta", torch.float32) and not known(32, "cpu", torch.float16)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    caches = (_compiled, products, native.load_library, notices.say_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_a_compiler_the_engine_says_so_and_computes_with_torch(
    model, monkeypatch, caplog, nothing_compiled
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert Engine(model)._runner.kernels is None
    assert "no C compiler" in caplog.text


def test_a_compiler_that_fails_costs_a_warning(model, monkeypatch, caplog, tmp_path: Path, nothing_compiled) -> None:
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho this is no compiler >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Engine(model)._runner.kernels is None
    assert "this is no compiler" in caplog.text
    assert not list((tmp_path / "pacos").iterdir()), "nothing half made is left"
