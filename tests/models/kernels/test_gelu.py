import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.kernels import gelu as module
from app.models.kernels.cpu import kernels_for
from app.models.kernels.gelu import gelu

pytestmark = pytest.mark.skipif(kernels_for(torch.empty(0)) is None, reason="no C compiler compiles the kernels here")


def some(dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.linspace(-30, 30, 40_003), torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30])]).to(dtype)


def gradient(function, x: Tensor, factor: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, factor)[0]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_value_and_gradient_are_torchs(dtype: torch.dtype, rounding: float) -> None:
    x = some(dtype)
    factor = torch.linspace(-2, 3, len(x)).to(dtype)
    exact = x.double()
    expected = F.gelu(exact, approximate="tanh")
    torch.testing.assert_close(gelu(x).double(), expected, rtol=rounding, atol=1e-6)
    within = exact.abs() < 1e9  # beyond, torch's own gradient is 0 times infinity
    slope = gradient(lambda x: F.gelu(x, approximate="tanh"), exact, factor.double())
    torch.testing.assert_close(gradient(gelu, x, factor).double()[within], slope[within], rtol=rounding, atol=3e-6)


def test_any_layout_and_no_elements() -> None:
    x = torch.randn(7, 5, 9)
    for view in (x.transpose(0, 2), x[:, ::2], x[:0]):
        torch.testing.assert_close(gelu(view), F.gelu(view, approximate="tanh"))
        actual, expected = (
            gradient(function, view, torch.ones(()).expand(view.shape))
            for function in (gelu, lambda x: F.gelu(x, approximate="tanh"))
        )
        torch.testing.assert_close(actual, expected)


def test_what_the_kernel_does_not_know_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    for x in (torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float16), torch.randn(5, device="meta")):
        assert kernels_for(x) is None
        assert gelu(x).dtype == x.dtype
    x = torch.randn(5)
    with monkeypatch.context() as patch:
        patch.setattr(module, "kernels_for", lambda x: None)
        torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"), rtol=0, atol=0)


def test_torch_compile_takes_the_activation_in() -> None:
    x = torch.randn(300)
    torch.testing.assert_close(torch.compile(gelu, fullgraph=True)(x), F.gelu(x, approximate="tanh"))
