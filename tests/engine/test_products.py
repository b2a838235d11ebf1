"""Our own products beside exact ones; where the processor has no instructions for them, how weights are packed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from app.engine.kernels import products as module
from app.engine.kernels.products import PackedBytes, PackedNf4Weights, PackedWeights, Products, products
from app.models.kernels.native import load_library
from app.models.quantization.nf4 import VALUES

SHAPES = [(1, 70, 40), (2, 768, 100), (9, 64, 32), (17, 80, 33), (33, 50, 7), (64, 3072, 768), (130, 96, 1003)]
"""Rows, inputs, outputs: whole and broken tiles, panels, blocks of rows, and bytes of a tile's row."""


@pytest.fixture(scope="module", params=[True, False], ids=["tiles", "dots"])
def ours(request: pytest.FixtureRequest) -> Iterator[Products]:
    """In tiles where there are any, and by dot products, which a processor with tiles has, too."""
    library = load_library(module._SOURCE)
    if library is None or products() is None:
        pytest.skip("this machine has neither AMX nor AVX-512 with BF16 or VNNI, or no C compiler")
    made = Products(library, use_tiles=request.param)
    if request.param and not made.uses_tiles:
        pytest.skip("this machine has no AMX")
    yield made
    library.prepare_products(True)


@pytest.fixture
def of_bf16(ours: Products) -> Products:
    return ours if ours.of_bf16 else pytest.skip("this processor cannot multiply bf16")


@pytest.fixture
def of_bytes(ours: Products) -> Products:
    return ours if ours.of_bytes else pytest.skip("this processor cannot sum products of bytes exactly")


@pytest.mark.parametrize("neighbours", [2, 4], ids=["bf16", "bytes"])
def test_packed_weights_hold_each_weight_where_a_tile_wants_it(neighbours: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randint(-9, 9, (45, 70)).float(), torch.randint(-9, 9, (3, 70)).float()
    packed = module._pack(weight, neighbours=neighbours)
    panels, depth, pair, lines, outputs, _ = packed.shape
    assert (pair, lines, outputs) == (2, 16, 16) and packed.is_contiguous()
    filled = torch.zeros(3, depth * lines * neighbours)
    filled[:, :70] = x
    # As `tdpbf16ps` and `tdpbusd` do: neighbours of a line with as many neighbours of the row, summed over lines.
    sums = torch.einsum("rdln,pdtlon->rpto", filled.view(3, depth, lines, neighbours), packed)
    assert torch.equal(sums.reshape(3, panels * 32)[:, :45], x @ weight.T)


def test_the_source_compiles_for_any_processor() -> None:
    library = load_library(module._SOURCE)
    if library is None:
        pytest.skip("no C compiler")
    made = Products(library)
    assert (products() is not None) == (made.of_bf16 or made.of_bytes)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_of_bf16(of_bf16: Products, rows: int, inputs: int, outputs: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    bias = torch.randn(outputs).bfloat16() if has_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0.0)
    y = of_bf16.multiply(x, PackedWeights(weight, bias))
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-4 * inputs**0.5)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_bytes_are_exact_but_for_the_last_rounding(of_bytes, rows, inputs, outputs, dtype) -> None:
    torch.manual_seed(0)
    x = torch.randint(1, 256, (rows, inputs), dtype=torch.uint8)
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    codes[0], x[0] = 127, 255  # the largest sums
    scale, steps, bias = torch.rand(outputs), torch.rand(rows), torch.randn(outputs)
    exact = (x.double() - 128) @ codes.double().T * scale.double() * steps.double()[:, None] + bias.double()
    y = of_bytes.multiply_bytes(x, steps, PackedBytes(codes, scale, bias, zero=128), dtype)
    assert y.dtype == dtype
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=1e-4 * float(exact.abs().max()) * rtol)


NF4_SHAPES = [(1, 64, 40), (2, 768, 100), (9, 32, 32), (13, 288, 50), (33, 3072, 768), (130, 96, 1003)]
"""Rows, inputs, outputs: of blocks of rows, whole and broken panels, more panels than rows are read in place for, and
so many rows that a panel is looked up once for all of them."""


@pytest.mark.parametrize(("rows", "inputs", "outputs"), NF4_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_nf4_are_those_of_its_values_in_bf16(of_bf16: Products, rows, inputs, outputs, dtype) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs) if rows % 2 else None
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    absmax = torch.rand(outputs, inputs // 32) * 10.0 ** torch.randint(-20, 20, (outputs, 1))
    absmax[1] = 0
    y = of_bf16.multiply_nf4(x, PackedNf4Weights(codes, absmax, bias))
    largest = absmax.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scales = (absmax / largest).half().double() * largest.double()
    values = torch.tensor(VALUES).bfloat16().double()[codes.int()] * scales.repeat_interleave(32, dim=1)
    halved = x.bfloat16().double()
    expected = halved @ values.T + (0 if bias is None else bias.double())
    assert y.dtype == dtype
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert ((y.double() - expected).abs() <= rtol * expected.abs() + 1e-6 * (halved.abs() @ values.abs().T)).all()
    assert ((scales - absmax.double()).abs() <= 2**-11 * absmax.double() + 2**-24 * largest.double()).all()


def test_a_rows_product_of_nf4_is_the_same_beside_any_others(of_bf16: Products) -> None:
    torch.manual_seed(0)
    x, codes = torch.randn(70, 2048).bfloat16(), torch.randint(0, 16, (70, 2048), dtype=torch.uint8)
    weights = PackedNf4Weights(codes, torch.rand(70, 64), None)
    together = of_bf16.multiply_nf4(x, weights)
    for count in (1, 2, 9, 10, 12, 13, 33):
        assert torch.equal(of_bf16.multiply_nf4(x[:count], weights), together[:count])


def test_a_rows_result_does_not_depend_on_the_others(of_bf16: Products) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(150, 96).bfloat16(), PackedWeights(torch.randn(70, 96).bfloat16(), None)
    together = of_bf16.multiply(x, weights)
    for count in (2 if of_bf16.uses_tiles else 1, 9, 10, 16, 17, 32, 33, 100):
        assert torch.equal(of_bf16.multiply(x[:count], weights), together[:count])


def test_onednns_own_tiles_are_left_as_they_were(of_bf16: Products) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 96).bfloat16(), torch.randn(70, 96).bfloat16()
    packed, weights = torch.ops.mkldnn._reorder_linear_weight(weight, 40), PackedWeights(weight, None)
    expected = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    mine = of_bf16.multiply(x, weights)
    for _ in range(20):
        assert torch.equal(torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), expected)
        assert torch.equal(of_bf16.multiply(x, weights), mine)


def test_threads_multiply_at_once(of_bf16: Products) -> None:
    torch.manual_seed(0)
    weights = PackedWeights(torch.randn(200, 256).bfloat16(), None)
    inputs = [torch.randn(20 + number, 256).bfloat16() for number in range(4)]
    expected = [of_bf16.multiply(x, weights) for x in inputs]

    def many(number: int) -> bool:
        return all(torch.equal(of_bf16.multiply(inputs[number], weights), expected[number]) for _ in range(50))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(many, range(4)))
