import copy
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from app.errors import UserError
from app.models.checkpoints import load_decoder
from app.models.decoder import Decoder
from app.models.quantization import (
    QuantizationConfig,
    QuantizedLinear,
    Scheme,
    dequantize,
    prepare,
    quantize,
    quantized_bytes,
)
from app.models.quantization.int8 import Int8Dynamic, Int8Static, Int8Weight
from app.models.quantization.integer_product import (
    Kernel,
    OneDnnProduct,
    _cpu_kernel,
    is_exact,
    kernel_for,
    pack_fbgemm,
    pack_float,
    pack_int_mm,
)
from app.models.quantization.nf4 import VALUES, Nf4Linear

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
SHAPES = [(320, 96), (33, 17), (64, 64), (5, 3)]  # in, out
CPU = torch.device("cpu")


def seven_bit_onednn(weight: Tensor, scale: Tensor, bias: Tensor | None):
    return OneDnnProduct(weight, scale, bias, levels=63)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def new_linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    with torch.no_grad():
        linear.weight.copy_(random(out_features, in_features) / in_features**0.5)
        linear.bias.copy_(random(out_features, seed=1))
    return linear


def new_layer(scheme: Scheme, linear: nn.Linear, x: Tensor) -> QuantizedLinear:
    kinds = {"int8_dynamic": Int8Dynamic, "int8_static": Int8Static, "int8_weight": Int8Weight, "nf4": Nf4Linear}
    layer = kinds[scheme].like(linear)
    weight = linear.weight.detach()
    if isinstance(layer, Int8Static):
        layer.store_calibrated(weight, x.detach().abs().flatten(0, -2).amax(dim=0))
    else:
        layer.store(weight)
    layer.bias = linear.bias.detach().clone()
    return layer


def new_model(folder: Path, scheme: Scheme) -> Decoder:
    model = load_decoder(folder)
    calibration = [some_ids(seed) for seed in range(3)] if scheme == "int8_static" else None
    quantize(model, QuantizationConfig(scheme=scheme), calibration=calibration)
    return model


def some_ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(seed))


# --- nf4 ------------------------------------------------------------------------------------------


def slow_dynamic_floats() -> list[float]:
    """bitsandbytes' `create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)`, number by number."""
    values = [0.0, 1.0]
    for power in range(7):
        items = 2**power
        for item in range(items):
            mean = 0.1 + 0.9 * (item + 0.5) / items
            values += [mean * 10.0 ** (power - 6), -mean * 10.0 ** (power - 6)]
    return sorted(values)


def slow_nf4(weight: Tensor) -> tuple[list[int], list[float]]:
    """The code of each weight (first in the order of memory) and what it stands for, by loops over blocks."""
    flat = weight.flatten().double().tolist()
    blocks = [flat[i : i + 64] for i in range(0, len(flat), 64)]
    largest = [max(map(abs, block)) for block in blocks]
    mean = sum(largest) / len(largest)
    table = slow_dynamic_floats()
    restored: list[float] = []
    for i in range(0, len(largest), 256):
        centred = [value - mean for value in largest[i : i + 256]]
        outer = max(map(abs, centred))
        restored += [min(table, key=lambda t, v=v, o=outer: abs(t - v / o)) * outer + mean for v in centred]
    codes, values = [], []
    for block, scale, used in zip(blocks, largest, restored, strict=True):
        for weight_value in block:
            code = min(range(16), key=lambda c, v=weight_value, s=scale: abs(VALUES[c] - v / s))
            codes.append(code)
            values.append(VALUES[code] * used)
    return codes, values


@pytest.mark.parametrize("shape", [(130, 130), (17, 33)])  # 265 blocks, more than an outer one; 561 weights
def test_nf4_equals_a_slow_reference(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    layer = Nf4Linear(shape[1], shape[0], bias=False)
    layer.store(weight)
    codes, values = slow_nf4(weight)
    stored = torch.stack([layer.codes >> 4, layer.codes & 15], dim=1).flatten()[: weight.numel()]
    assert stored.tolist() == codes
    torch.testing.assert_close(
        layer.dequantized_weight().flatten(), torch.tensor(values), atol=1e-6, rtol=1e-5, check_dtype=False
    )


def test_nf4_table_is_the_papers() -> None:
    # Appendix E: quantiles of N(0, 1), eight below zero and nine from it on, divided by the largest
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    expected = torch.cat([below, torch.zeros(1), above]).sort().values
    torch.testing.assert_close(torch.tensor(VALUES), expected / expected.max(), atol=1e-5, rtol=0)


def test_nf4_keeps_a_layer_of_zeros() -> None:
    layer = Nf4Linear(33, 17, bias=False)
    layer.store(torch.zeros(17, 33))
    assert torch.equal(layer.dequantized_weight(), torch.zeros(17, 33))


def test_nf4_takes_little_more_than_four_bits_a_weight() -> None:
    layer = Nf4Linear(1024, 512, bias=False)
    assert layer.num_bytes * 8 / (1024 * 512) == pytest.approx(4.127, abs=1e-3)


# --- int8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Int8Weight, Int8Dynamic])
def test_an_int8_weight_is_off_by_half_a_step_at_most(kind: type[Int8Weight]) -> None:
    weight = random(17, 33)
    layer = kind(33, 17, bias=False)
    layer.store(weight)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((layer.dequantized_weight() - weight).abs() <= step / 2 * 1.0001).all())


KERNELS = {
    "chosen": kernel_for(CPU),
    "onednn": Kernel(63, seven_bit_onednn),
    "fbgemm": Kernel(63, pack_fbgemm),
    "int_mm": Kernel(127, pack_int_mm),
    "float": Kernel(127, pack_float),
}


def kernel_named(name: str) -> Kernel:
    kernel = KERNELS[name]
    if not is_exact(kernel):
        pytest.skip("this processor or build of torch lacks the kernel")
    return kernel


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows", [1, 8, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_integer_product_equals_the_same_integers_in_float(name: str, rows: int, shape: tuple[int, int]) -> None:
    kernel = kernel_named(name)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, shape[::-1], generator=generator, dtype=torch.int8)
    weight[0] = 127  # with the largest activations: the sums that saturate in 16 bits
    values = torch.randint(-kernel.levels, kernel.levels + 1, (rows, shape[0]), generator=generator).float()
    values[0] = kernel.levels
    scale, bias = torch.rand(shape[1], generator=generator) + 0.5, random(shape[1])
    for offset in (None, bias):
        expected = values.double() @ weight.double().T * scale + (0 if offset is None else offset)
        torch.testing.assert_close(kernel.pack(weight, scale, offset)(values).double(), expected, rtol=1e-6, atol=1e-5)


def test_a_kernel_that_saturates_is_not_taken() -> None:
    def saturates(weight: Tensor, scale: Tensor, bias: Tensor | None):
        return lambda values: (values @ weight.float().T).clamp(-(2**15), 2**15 - 1)

    def is_missing(weight: Tensor, scale: Tensor, bias: Tensor | None):
        return torch.ops.onednn.no_such_operator

    assert not is_exact(Kernel(127, saturates))
    assert not is_exact(Kernel(127, is_missing))
    assert is_exact(kernel_for(CPU))


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_integer_path_equals_its_float_emulation(scheme: Scheme, shape: tuple[int, int]) -> None:
    x = random(2, 7, shape[0], seed=3)
    layer = new_layer(scheme, new_linear(*shape), x)
    levels = kernel_for(CPU).levels
    if isinstance(layer, Int8Static):
        values = x / layer.smoothing
        step = layer.input_range / levels
        rounded = (x / (layer.smoothing * step)).clamp(-levels, levels).round() * step * layer.smoothing
        assert float(values.abs().max()) <= float(layer.input_range) * 1.0001
    else:
        step = x.abs().amax(dim=-1, keepdim=True) / levels
        rounded = (x / step).round() * step
    expected = F.linear(rounded, layer.dequantized_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_static_ranges_cut_off_what_lies_outside() -> None:
    x = random(1, 9, 33, seed=3)
    layer = new_layer("int8_static", new_linear(33, 17), x)
    far = 100 * x.sign() * x.abs().amax(dim=(0, 1))
    torch.testing.assert_close(layer(far), layer(far * 3))


def test_smoothing_keeps_precision_where_one_channel_is_far_larger() -> None:
    linear = new_linear(64, 48)
    x = random(1, 200, 64, seed=3)
    x[..., 5] *= 100
    expected = linear(x).detach()
    smooth = new_layer("int8_static", linear, x)
    plain = new_layer("int8_static", linear, x)
    plain.smoothing = torch.ones(64)
    plain.input_range = x.abs().max()
    plain.store(linear.weight.detach())
    assert float((smooth(x) - expected).norm()) < 0.5 * float((plain(x) - expected).norm())


# --- every scheme ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1, 50), (1, 1), (2, 0)])
def test_a_layer_is_close_to_the_linear_it_stands_for(
    scheme: Scheme, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    linear = new_linear(320, 96)
    x = random(*shape, 320, seed=3)
    layer = new_layer(scheme, linear, random(1, 1000, 320, seed=4))
    y = layer(x.to(dtype))
    assert y.shape == (*shape, 96) and y.dtype == dtype
    expected = linear(x).detach()
    tolerance = 0.15 if scheme == "nf4" else 0.03
    assert float((y.float() - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_decides_the_format(scheme: Scheme) -> None:
    x = random(2, 5, 33, seed=3)
    layer = new_layer(scheme, new_linear(33, 17), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_to_the_input_is_that_of_the_dequantized_layer(scheme: Scheme, shape: tuple[int, int]) -> None:
    x = random(2, 6, shape[0], seed=3).requires_grad_()
    layer = new_layer(scheme, new_linear(*shape), x)
    weights = random(2, 6, shape[1], seed=5)
    (gradient,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    (expected,) = torch.autograd.grad((layer.dequantized()(x) * weights).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_passes_autocast(scheme: Scheme) -> None:
    x = random(2, 6, 33, seed=3).requires_grad_()
    layer = new_layer(scheme, new_linear(33, 17), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    expected = layer.dequantized_weight().sum(dim=0).expand(2, 6, 33)
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_models_logits_are_close_to_full_precision(tiny_model: Path, scheme: Scheme) -> None:
    full, model = load_decoder(tiny_model), new_model(tiny_model, scheme)
    with torch.no_grad():
        expected, logits = full.head(full(some_ids(9))), model.head(model(some_ids(9)))
    error = (logits - expected).norm() / expected.norm()
    assert 0 < float(error) < (0.05 if scheme == "nf4" else 0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_model_loads_bit_for_bit_into_prepared_layers(tiny_model: Path, tmp_path: Path, scheme: Scheme) -> None:
    model = new_model(tiny_model, scheme)
    ids = some_ids(9)
    with torch.no_grad():
        expected = model(ids)  # after which kernels hold their packed forms
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        config = QuantizationConfig.model_validate_json(QuantizationConfig(scheme=scheme).model_dump_json())
        with torch.device("meta"):
            loaded = Decoder(model.config)
        prepare(loaded, config)
        loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
        assert torch.equal(loaded.eval()(ids), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantized_layers_are_plain_and_the_quantized_ones_values(tiny_model: Path, scheme: Scheme) -> None:
    model = new_model(tiny_model, scheme)
    layer = model.get_submodule("blocks.0.mlp.up")
    assert isinstance(layer, QuantizedLinear)
    dequantize(model)
    linear = model.get_submodule("blocks.0.mlp.up")
    assert isinstance(linear, nn.Linear) and torch.equal(linear.weight, layer.dequantized_weight())
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert model.state_dict().keys() == load_decoder(tiny_model).state_dict().keys()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_new_weights_replace_packed_ones_and_copies_pack_their_own(scheme: Scheme) -> None:
    x = random(1, 9, 64, seed=3)
    first, second = new_linear(64, 48), new_linear(64, 48)
    with torch.no_grad():
        second.weight.neg_()
    layer, other = new_layer(scheme, first, x), new_layer(scheme, second, x)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_cast_to_bf16_keeps_its_constants(tiny_model: Path, scheme: Scheme) -> None:
    model = new_model(tiny_model, scheme)
    before = copy.deepcopy(model)
    model.to(torch.bfloat16)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(
                layer.dequantized_weight(),
                before.get_submodule(name).dequantized_weight(),  # type: ignore[operator]
            )
    with torch.no_grad():
        assert model(some_ids()).dtype == torch.bfloat16


def test_layers_without_a_bias_work() -> None:
    x = random(1, 9, 64, seed=3)
    linear = nn.Linear(64, 48, bias=False)
    for scheme in SCHEMES:
        layer = new_layer(scheme, new_linear(64, 48), x)
        layer.bias = None
        torch.testing.assert_close(layer(x), layer.dequantized()(x), rtol=0, atol=0.1)
        assert type(layer).like(linear).bias is None


def test_sizes_count_the_layers_that_were_quantized(tiny_model: Path) -> None:
    model = load_decoder(tiny_model)
    quantize(model, QuantizationConfig(scheme="int8_weight", targets=("mlp.up",)))
    sizes = quantized_bytes(model)
    weights, outputs = 2 * 32 * 64, 2 * 64
    assert sizes == (weights + outputs * (4 + 4), 4 * (weights + outputs), 2 * (weights + outputs))
    assert isinstance(model.get_submodule("blocks.0.mlp.down"), nn.Linear)


def test_packing_warns_of_nothing() -> None:
    x = random(1, 9, 64, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new_layer("int8_dynamic", new_linear(64, 48), x)(x)


# --- refusals -------------------------------------------------------------------------------------


def test_a_quantized_model_is_refused(tiny_model: Path) -> None:
    model = new_model(tiny_model, "nf4")
    for again in (quantize, prepare):
        with pytest.raises(UserError, match="quantized already, as 'nf4'"):
            again(model, QuantizationConfig(scheme="int8_weight"))


def test_a_target_that_matches_nothing_is_refused_with_those_that_exist(tiny_model: Path) -> None:
    config = QuantizationConfig(scheme="nf4", targets=("attn.qkv", "q_proj"))
    for change in (quantize, prepare):
        model = load_decoder(tiny_model)
        with pytest.raises(UserError, match="targets='q_proj' matches no layer; the model has: attn.out, attn.qkv"):
            change(model, config)
        assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_static_ranges_need_data_and_other_schemes_take_none(tiny_model: Path) -> None:
    model = load_decoder(tiny_model)
    for calibration in (None, [], [torch.zeros(1, 0, dtype=torch.long)]):
        with pytest.raises(UserError, match="needs calibration data"):
            quantize(model, QuantizationConfig(scheme="int8_static"), calibration=calibration)
    with pytest.raises(UserError, match="takes no calibration data"):
        quantize(model, QuantizationConfig(scheme="nf4"), calibration=[some_ids()])


def test_the_choice_of_kernel_is_the_same_where_tensors_have_no_content() -> None:
    _cpu_kernel.cache_clear()
    with FakeTensorMode():
        found_first = kernel_for(torch.device("cpu"))
    _cpu_kernel.cache_clear()
    assert found_first.levels == kernel_for(torch.device("cpu")).levels
    assert _name(found_first.pack) == _name(kernel_for(torch.device("cpu")).pack)


def _name(pack: Any) -> str:
    return getattr(pack, "func", pack).__name__
