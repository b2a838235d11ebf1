"""Attention's backward pass by products of whole sequences, beside torch's in fp32."""

import pytest
import torch
import torch.nn.functional as F

from app.models.attention import RowAttention
from app.models.kernels.causal_attention import LONGEST, MERGED, causal_attention, is_faster, spans_of

pytestmark = pytest.mark.filterwarnings("error")


def heads(time: int, *, batch: int = 2, width: int = 16, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(time)
    return [
        torch.randn(batch, 3, time, width, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    ]  # fmt: skip


def gradients(attend, parts: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    mixed = attend(*parts)
    direction = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).to(mixed.dtype)
    return mixed, list(torch.autograd.grad(mixed, parts, direction))


@pytest.mark.parametrize("time", [1, 31, 32, 33, 200])
def test_it_gives_the_gradients_of_torch_in_fp32(time: int) -> None:
    rounded = heads(time)
    exact = [part.detach().float().requires_grad_() for part in rounded]
    spans = spans_of([time, time])
    mixed, ours = gradients(lambda *qkv: causal_attention(*qkv, spans), rounded)
    expected, theirs = gradients(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), exact)
    torch.testing.assert_close(mixed.float(), expected, atol=0.02, rtol=0.02)
    for gradient, reference in zip(ours, theirs, strict=True):
        assert gradient.shape == reference.shape and gradient.dtype == torch.bfloat16
        assert (gradient.float() - reference).norm() <= 0.01 * reference.norm() + 1e-6


def test_no_gradient_crosses_from_one_document_into_another() -> None:
    """Through `RowAttention`, which is where training takes it."""
    parts = heads(70, batch=1)
    documents = torch.tensor([[0] * 40 + [1] * 30])
    mixed = RowAttention(documents).attend(0, *parts)
    assert "CausalAttention" in _names(mixed.grad_fn)
    of_second = torch.autograd.grad(mixed[:, :, 40:].sum(), parts)
    for gradient in of_second:
        assert gradient[:, :, :40].eq(0).all()
    assert of_second[2][:, :, 40:].ne(0).any()


@pytest.mark.parametrize("lengths", [[5, 7, 3], [190, 3, 100, 60], [40] * 12])
def test_neighbours_that_are_multiplied_as_one_do_not_see_each_other(lengths: list[int]) -> None:
    parts = heads(sum(lengths), batch=1)
    spans = spans_of(lengths)
    assert all(sum(span.lengths) <= max(MERGED, *span.lengths) for span in spans)
    assert [length for span in spans for length in span.lengths] == lengths
    _, ours = gradients(lambda *qkv: causal_attention(*qkv, spans), parts)
    exact = [part.detach().float().requires_grad_() for part in parts]
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    _, theirs = gradients(lambda *qkv: RowAttention(documents).attend(0, *qkv), exact)
    for gradient, reference in zip(ours, theirs, strict=True):
        assert (gradient.float() - reference).norm() <= 0.01 * reference.norm()


def test_long_documents_are_left_to_torch() -> None:
    assert spans_of([LONGEST]) is not None and spans_of([3, LONGEST + 1]) is None
    mixed = RowAttention().attend(0, *heads(LONGEST + 1, batch=1, width=16))
    assert "CausalAttention" not in _names(mixed.grad_fn)


def _names(node) -> str:
    """Of the operations from which a tensor comes."""
    return "" if node is None else type(node).__name__ + " ".join(_names(before) for before, _ in node.next_functions)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (heads(8, dtype=torch.float32), "fp32 has units of its own"),
        ([part.detach() for part in heads(8)], "nobody asks for a gradient"),
        ([heads(8)[0], heads(8)[0][:, :1], heads(8)[0][:, :1]], "grouped heads"),
    ],
)
def test_torch_computes_it_where_that_is_better(parts: list[torch.Tensor], why: str) -> None:
    assert not is_faster(parts[0], parts[1]), why
    with torch.no_grad():
        assert not is_faster(*heads(8)[:2])
    assert is_faster(*heads(8)[:2])
