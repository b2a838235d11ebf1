"""Attention of whole documents and its gradient, beside torch's in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from app.models.attention import RowAttention
from app.models.kernels.causal_attention import Documents, can_attend, causal_attention

pytestmark = pytest.mark.filterwarnings("error")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
"""Of a result, of which all else is fp32."""


def parts(
    *, batch: int = 1, time: int, heads: int = 3, kv_heads: int = 3, width: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k and v as a linear layer makes them: a token's heads side by side."""
    draw = torch.Generator().manual_seed(time)
    rows = torch.randn(batch, time, heads + 2 * kv_heads, width, generator=draw).to(dtype)
    return [part.detach().requires_grad_() for part in rows.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """By torch, document by document; those of a batch's rows have the rows' length."""
    ends_to_end = [part.transpose(1, 2).flatten(0, 1).split(lengths) for part in (q, k, v)]
    mixed = [
        F.scaled_dot_product_attention(*(p.transpose(0, 1).unsqueeze(0) for p in each), is_causal=True, enable_gqa=True)
        for each in zip(*ends_to_end, strict=True)
    ]
    joined = torch.cat([part.squeeze(0).transpose(0, 1) for part in mixed])
    return joined.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def with_gradients(attend, given: list[Tensor]) -> list[Tensor]:
    mixed = attend(*given)
    direction = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).to(mixed.dtype)
    return [mixed, *torch.autograd.grad(mixed, given, direction)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "lengths", "shape"),
    [
        (1, [1], {}),
        (1, [5, 1, 7], {"width": 8}),
        (1, [23, 24, 25, 63, 64, 65], {}),
        (2, [200, 200], {"width": 64}),
        (3, [40, 30, 70, 1, 69], {"width": 64}),
        (1, [33, 100], {"heads": 6, "kv_heads": 2, "width": 32}),
        (2, [50, 50], {"heads": 4, "kv_heads": 1, "width": 20}),
        (1, [130, 12], {"width": 96}),
        (1, [90], {"heads": 1, "kv_heads": 1, "width": 200}),
        (1, [1500], {"heads": 1, "kv_heads": 1, "width": 16}),
    ],
)
def test_it_computes_what_torch_does_in_fp64(batch: int, lengths: list[int], shape: dict, dtype: torch.dtype) -> None:
    given = parts(batch=batch, time=sum(lengths) // batch, dtype=dtype, **shape)
    exact = [part.detach().double().requires_grad_() for part in given]
    ours = with_gradients(lambda *qkv: causal_attention(*qkv, Documents(lengths)), given)
    theirs = with_gradients(lambda *qkv: one_by_one(*qkv, lengths), exact)
    for result, reference in zip(ours, theirs, strict=True):
        assert result.shape == reference.shape and result.dtype == dtype
        # A document of one token has no gradient but its value's.
        assert (result.double() - reference).norm() <= ROUNDING[dtype] * max(1e-2, reference.norm())


def test_large_scores_do_not_overflow() -> None:
    given = [(10 * part).detach().requires_grad_() for part in parts(time=70)]
    exact = [part.detach().double().requires_grad_() for part in given]
    ours = with_gradients(lambda *qkv: causal_attention(*qkv, Documents([70])), given)
    theirs = with_gradients(lambda *qkv: one_by_one(*qkv, [70]), exact)
    for result, reference in zip(ours, theirs, strict=True):
        assert (result.double() - reference).norm() <= 1e-4 * reference.norm()


def test_a_document_comes_out_the_same_to_the_last_bit_whatever_is_beside_it() -> None:
    given = parts(time=100, width=64, dtype=torch.bfloat16)
    whole = with_gradients(lambda *qkv: causal_attention(*qkv, Documents([30, 45, 25])), given)
    direction = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    alone = [part[:, :, 30:75].detach().requires_grad_() for part in given]
    mixed = causal_attention(*alone, Documents([45]))
    by_itself = [mixed, *torch.autograd.grad(mixed, alone, direction[:, :, 30:75])]
    assert all(torch.equal(ours[:, :, 30:75], theirs) for ours, theirs in zip(whole, by_itself, strict=True))


def test_no_gradient_crosses_from_one_document_into_another_nor_from_a_later_token() -> None:
    """Through `RowAttention`, which is where training takes it."""
    given = parts(time=70)
    mixed = RowAttention(torch.tensor([[0] * 40 + [1] * 30])).attend(0, *given)
    assert "CausalAttention" in _names(mixed.grad_fn)
    gradients = torch.autograd.grad(mixed[:, :, 40:55].sum(), given)
    for gradient in gradients:
        assert gradient[:, :, :40].eq(0).all() and gradient[:, :, 55:].eq(0).all()
    assert gradients[2][:, :, 40:55].ne(0).all()


@pytest.mark.parametrize("contiguous", ["heads apart", "numbers apart"])
def test_numbers_may_lie_in_any_order(contiguous: str) -> None:
    """Rotated queries and keys have a head's tokens side by side."""
    given = parts(batch=2, time=40, width=32)
    if contiguous == "heads apart":
        moved = [part.detach().contiguous() for part in given]
    else:
        moved = [part.detach().transpose(2, 3).contiguous().transpose(2, 3) for part in given]
        assert moved[0].stride(-1) != 1
    documents = Documents([10, 30, 40])
    expected = with_gradients(lambda *qkv: causal_attention(*qkv, documents), given)
    ours = with_gradients(lambda *qkv: causal_attention(*qkv, documents), [part.requires_grad_() for part in moved])
    assert all(map(torch.equal, ours, expected))
    # and the gradient may be one number, expanded
    one = torch.autograd.grad(causal_attention(*given, documents).sum(), given)
    many = torch.autograd.grad(causal_attention(*given, documents), given, torch.ones_like(given[0]))
    assert all(map(torch.equal, one, many))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    given = parts(time=120, width=64)
    documents = Documents([50, 20, 40, 10])
    before = torch.get_num_threads()
    expected = with_gradients(lambda *qkv: causal_attention(*qkv, documents), given)
    try:
        torch.set_num_threads(threads)
        ours = with_gradients(lambda *qkv: causal_attention(*qkv, documents), given)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, ours, expected))


def test_fake_tensors_get_shapes_and_keep_what_real_ones_do() -> None:
    with FakeTensorMode():
        given = parts(batch=2, time=30, heads=4, kv_heads=2, dtype=torch.bfloat16)
        assert can_attend(*given)
        mixed = RowAttention().attend(0, *given)
        assert mixed.shape == given[0].shape
        assert "CausalAttention" in _names(mixed.grad_fn)
        gradients = torch.autograd.grad(mixed.sum(), given)
    assert [gradient.shape for gradient in gradients] == [part.shape for part in given]


@pytest.mark.parametrize("change", ["fp64", "fp16", "mixed", "a prefix", "another kernel"])
def test_torch_computes_what_it_is_not_for(change: str) -> None:
    dtype = {"fp64": torch.float64, "fp16": torch.float16}.get(change, torch.float32)
    q, k, v = parts(time=20, dtype=dtype)
    if change == "mixed":
        assert not can_attend(q, k, v.bfloat16())
        return
    prefix = [tuple(torch.randn(2, 3, 4, 16))] if change == "a prefix" else None
    rows = RowAttention(prefix=prefix, backend="math" if change == "another kernel" else "auto")
    assert "CausalAttention" not in _names(rows.attend(0, q, k, v).grad_fn)


def _names(node) -> str:
    """Of the operations from which a tensor comes."""
    return "" if node is None else type(node).__name__ + " ".join(_names(before) for before, _ in node.next_functions)
