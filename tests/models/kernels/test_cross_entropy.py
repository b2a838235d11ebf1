import logging
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.models.kernels import cross_entropy as module
from app.models.kernels import notices
from app.models.kernels.cpu import kernels_for
from app.models.kernels.cross_entropy import fused_cross_entropy, reference_cross_entropy

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def head(num_rows: int = 37, vocab_size: int = 211, width: int = 16, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [rows, width] and weight [vocab, width], both with gradient, and labels [rows]."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, width, generator=generator) for size in (num_rows, vocab_size))
    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    rows, weight = rows.to(**options).requires_grad_(), weight.to(**options).requires_grad_()
    return rows, weight, labels.to(rows.device)


def outcome(function: Any, rows: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Loss and gradients of rows and weight, of a third of the loss."""
    loss = function(rows, weight, labels, **options)
    return loss, *torch.autograd.grad(loss / 3, [rows, weight])


@pytest.mark.parametrize("chunk_rows", [1, 5, 37, 100, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_chunked_loss_and_gradients_match_the_reference(chunk_rows: int | None, smoothing: float) -> None:
    actual = outcome(fused_cross_entropy, *head(), chunk_rows=chunk_rows, smoothing=smoothing)
    expected = outcome(reference_cross_entropy, *head(), smoothing=smoothing)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_rows_beyond_a_block_of_the_cache_match_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_BYTES", 4 * 211 * 4)  # blocks of 4 rows in chunks of 10
    actual = outcome(fused_cross_entropy, *head(), chunk_rows=10)
    torch.testing.assert_close(actual, outcome(reference_cross_entropy, *head()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("multiple", [1, 16, 211, 1000])
def test_rows_of_zeros_that_fill_the_head_up_change_nothing(multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outcome(reference_cross_entropy, *head(dtype=torch.bfloat16), smoothing=0.1)
    monkeypatch.setattr(module, "VOCAB_MULTIPLE", multiple)
    actual = outcome(fused_cross_entropy, *head(dtype=torch.bfloat16), chunk_rows=10, smoothing=0.1)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(kernels_for(torch.empty(0)) is None, reason="no C compiler compiles the kernels here")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [2, 15, 16, 211, 50_257])
def test_the_c_kernel_matches_torch(vocab_size: int, dtype: torch.dtype, smoothing: float) -> None:
    torch.manual_seed(0)
    wide = (8 * torch.randn(6, vocab_size + 7)).to(dtype)
    wide[1, 0], wide[2, -8] = 90, -float("inf")  # sure; impossible
    labels = torch.tensor([0, 0, 0, vocab_size - 1, vocab_size // 2, vocab_size // 3])
    exact = wide[:, :vocab_size].float().clone()
    expected = module._torch_loss_and_gradient(exact, labels, smoothing=0.0, with_gradient=False)
    if smoothing:  # an impossible token has no smoothed loss
        wide[2, -8] = -50
        exact = wide[:, :vocab_size].float().clone()
        expected = module._torch_loss_and_gradient(exact, labels, smoothing=smoothing, with_gradient=False)
    module._torch_loss_and_gradient(exact, labels, smoothing=smoothing, with_gradient=True)
    logits = wide[:, :vocab_size]
    untouched = wide[:, vocab_size:].clone()
    for with_gradient in (False, True):
        loss = module._loss_and_gradient_on_cpu(logits, labels, smoothing=smoothing, with_gradient=with_gradient)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(logits.float(), exact, rtol=rounding, atol=1e-6)
    assert torch.equal(wide[:, vocab_size:], untouched)


def test_a_label_outside_the_vocabulary_has_no_loss_on_a_cpu() -> None:
    logits = torch.zeros(2, 20)
    loss = module._loss_and_gradient_on_cpu
    assert loss(logits, torch.tensor([3, 5]), smoothing=0.0, with_gradient=False).isfinite()
    if kernels_for(logits) is not None:
        assert loss(logits, torch.tensor([3, 20]), smoothing=0.0, with_gradient=False).isnan()


def test_the_chunked_loss_passes_gradcheck() -> None:
    rows, weight, labels = head(7, 11, 5, dtype=torch.float64)
    for smoothing in (0.0, 0.2):
        loss = partial(fused_cross_entropy, labels=labels, chunk_rows=3, smoothing=smoothing)
        assert torch.autograd.gradcheck(loss, (rows, weight))


def test_under_autocast_products_are_bf16_and_the_loss_is_fp32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outcome(fused_cross_entropy, *head(), chunk_rows=8)
        expected = outcome(reference_cross_entropy, *head())
    assert [tensor.dtype for tensor in actual] == [torch.float32] * 3
    exact = outcome(reference_cross_entropy, *head())
    for ours, theirs, truth in zip(actual, expected, exact, strict=True):
        assert (ours - truth).norm() <= 0.02 * truth.norm()
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-3 * truth.norm()
    assert not torch.equal(actual[1], exact[1])  # so the products were not in fp32


def test_bf16_weights_get_bf16_gradients_summed_in_fp32() -> None:
    actual = outcome(fused_cross_entropy, *head(dtype=torch.bfloat16), chunk_rows=1)
    rows, weight, labels = head(dtype=torch.bfloat16)
    exact = outcome(reference_cross_entropy, rows.detach().float().requires_grad_(), weight.float(), labels)
    assert [tensor.dtype for tensor in actual] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for ours, truth in zip(actual, exact, strict=True):
        assert (ours.float() - truth).norm() <= 0.01 * truth.norm()


def test_a_sure_answer_keeps_its_small_gradient_in_bf16() -> None:
    logits = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16)
    module._torch_loss_and_gradient(logits, torch.tensor([0]), smoothing=0.0, with_gradient=True)
    torch.testing.assert_close(logits[0, 0].float(), -torch.sigmoid(torch.tensor(-8.0)), rtol=0.01, atol=0)


def test_a_loss_scale_beyond_fp16_does_not_overflow() -> None:
    rows, weight, labels = head(4, 50, 8, dtype=torch.float16)
    loss = fused_cross_entropy(rows, weight / 1000, labels) * 2.0**17
    (gradient,) = torch.autograd.grad(loss, rows)
    assert gradient.isfinite().all() and gradient.any()


def test_no_rows_lose_nothing() -> None:
    rows, weight, labels = head(num_rows=0)
    loss, grad_rows, grad_weight = outcome(fused_cross_entropy, rows, weight, labels)
    assert loss == 0 and grad_rows.shape == rows.shape and not grad_weight.any()


def test_large_logits_do_not_overflow() -> None:
    rows, weight, labels = head()
    actual = fused_cross_entropy(rows * 1000, weight, labels)
    torch.testing.assert_close(actual, reference_cross_entropy(rows * 1000, weight, labels))


def test_it_is_differentiable_once_only() -> None:
    rows, weight, labels = head()
    scale = torch.ones((), requires_grad=True)
    loss = fused_cross_entropy(rows, weight, labels) * scale
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_kept_graph_gives_the_same_gradient_twice() -> None:
    rows, weight, labels = head()
    loss = fused_cross_entropy(rows, weight, labels) / 7
    first = torch.autograd.grad(loss, [rows, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [rows, weight])
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.seen.append(tuple(tensor.shape))
        return result

    def largest(self) -> int:
        return max(torch.Size(shape).numel() for shape in self.seen)


def test_all_logits_are_never_in_memory() -> None:
    rows, weight, labels = head(num_rows=64, vocab_size=500, width=8)
    with Shapes() as reference:
        outcome(reference_cross_entropy, rows, weight, labels)
    with Shapes() as chunked:
        outcome(fused_cross_entropy, rows, weight, labels, chunk_rows=10)
    assert reference.largest() == 64 * 500
    assert chunked.largest() == 10 * 500


def test_a_frozen_head_costs_no_gradient_of_its_size() -> None:
    rows, weight, labels = head(num_rows=64, vocab_size=500, width=8)
    with Shapes() as shapes:
        loss = fused_cross_entropy(rows, weight.detach(), labels, chunk_rows=3)
        torch.autograd.grad(loss, rows)
    assert (500, 8) not in shapes.seen and shapes.largest() < 500 * 8


def test_without_gradients_only_the_loss_is_computed() -> None:
    rows, weight, labels = head(num_rows=64, vocab_size=500, width=8)
    with torch.no_grad(), Shapes() as shapes:
        loss = fused_cross_entropy(rows, weight, labels, chunk_rows=3)
    torch.testing.assert_close(loss, reference_cross_entropy(rows, weight, labels).detach())
    assert not loss.requires_grad
    assert (64, 8) not in shapes.seen and (500, 8) not in shapes.seen


def test_chunks_are_even_and_within_the_budget() -> None:
    budget = module.CHUNK_BYTES["cpu"]
    assert module.chunk_rows_on("cpu", 2000, row_bytes=budget // 1500) == 1000
    assert module.chunk_rows_on("cpu", 3, row_bytes=2 * budget) == 1
    assert module.chunk_rows_on("cpu", 0, row_bytes=8) == 1


@pytest.mark.parametrize("num_rows", [1, 63, 64, 130])
def test_in_bf16_rows_are_rounded_up_to_a_few_shapes(num_rows: int) -> None:
    """oneDNN keeps what it compiles for each shape: as many of them as steps would fill the memory."""
    rows, weight, labels = head(num_rows=num_rows, vocab_size=500, width=8)
    rows, weight = rows.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    with Shapes() as shapes:
        loss = fused_cross_entropy(rows, weight, labels, chunk_rows=64)
        ours = torch.autograd.grad(loss, (rows, weight))
    assert {shape[0] for shape in shapes.seen if len(shape) == 2 and shape[1] == 500} <= {64, num_rows % 64 or 64}
    exact = [tensor.detach().float().requires_grad_() for tensor in (rows, weight)]
    expected = reference_cross_entropy(*exact, labels)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-2, atol=1e-2)
    for gradient, reference in zip(ours, torch.autograd.grad(expected, exact), strict=True):
        assert (gradient.float() - reference).norm() <= 0.02 * reference.norm()


def test_without_triton_a_gpu_gets_the_torch_version_and_says_so_once(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "app.models.kernels.cross_entropy_triton", None)  # importing it fails
    notices.say_once.cache_clear()
    for index in (0, 1):
        module._kernel_for.cache_clear()
        assert module._kernel_for(torch.device("cuda", index)) is module._torch_loss_and_gradient
    module._kernel_for.cache_clear()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "no Triton kernel" in caplog.text


INTERPRETED = """
import torch
from app.models.kernels import cross_entropy as module
from app.models.kernels.cross_entropy_triton import loss_and_gradient

torch.manual_seed(0)
for vocab_size in (1, 37, 4096, 5003):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        logits = (4 * torch.randn(3, vocab_size)).to(dtype)
        labels = torch.tensor([0, vocab_size - 1, vocab_size // 2])
        ours, theirs, untouched = logits.clone(), logits.clone(), logits.clone()
        smoothing = 0.1 if vocab_size % 2 else 0.0
        loss = loss_and_gradient(ours, labels, smoothing=smoothing, with_gradient=True)
        expected = module._torch_loss_and_gradient(theirs, labels, smoothing=smoothing, with_gradient=True)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-6)
        torch.testing.assert_close(
            loss_and_gradient(untouched, labels, smoothing=smoothing, with_gradient=False), loss
        )
        assert torch.equal(untouched, logits)

assert loss_and_gradient(torch.zeros(2, 5), torch.tensor([1, -100]), smoothing=0.0, with_gradient=False).isnan()

rows, weight = torch.randn(7, 8, requires_grad=True), torch.randn(131, 8, requires_grad=True)
labels = torch.randint(0, 131, (7,))
expected = torch.autograd.grad(module.reference_cross_entropy(rows, weight, labels), [rows, weight])
module._kernel_for = lambda device: loss_and_gradient
actual = torch.autograd.grad(module.fused_cross_entropy(rows, weight, labels, chunk_rows=3), [rows, weight])
torch.testing.assert_close(actual, expected)
"""


def test_the_triton_kernel_matches_torch_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when the kernel is defined, so: a process of its own
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_triton_kernel_compiles_without_a_gpu(capability: int, dtype: str, tmp_path, monkeypatch) -> None:
    triton = pytest.importorskip("triton", reason="needs Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from app.models.kernels.cross_entropy_triton import BLOCK, NUM_WARPS, cross_entropy_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"logits": f"*{dtype}", "labels": "*i64", "losses": "*fp32", "row_stride": "i32", "vocab_size": "i32"}
    signature["smoothing"] = "fp32"
    source = ASTSource(
        cross_entropy_kernel,
        {**signature, "WITH_GRADIENT": "constexpr", "BLOCK": "constexpr"},
        {"WITH_GRADIENT": True, "BLOCK": BLOCK},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS})
    assert f".target sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_the_triton_kernel_matches_the_reference(dtype: torch.dtype) -> None:
    inputs = head(300, 50_257, 64, device="cuda", dtype=dtype)
    assert module._kernel_for(inputs[0].device) is not module._torch_loss_and_gradient
    actual = outcome(fused_cross_entropy, *inputs, chunk_rows=128)
    exact = outcome(reference_cross_entropy, *head(300, 50_257, 64, device="cuda"))
    for ours, truth in zip(actual, exact, strict=True):
        assert (ours - truth).norm() <= (1e-4 if dtype == torch.float32 else 0.03) * truth.norm()
