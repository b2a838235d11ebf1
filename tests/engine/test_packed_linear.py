"""Packed products beside plain ones, and the few shapes that oneDNN gets to see."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from app.engine.packing import PackedLinear, can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.float32, torch.device("cpu")), reason="this torch has no oneDNN")


class Rows(TorchDispatchMode):
    """How many rows the packed products have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_linear_pointwise" in str(func):
            self.seen.add(args[0].shape[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_batch", [False, True])
def test_any_number_of_rows_is_multiplied_in_a_few_shapes(with_batch: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80).requires_grad_(False)
    packed = PackedLinear(linear, None)
    with Rows() as rows, torch.inference_mode():
        for count in [*range(1, 140), 2000]:
            x = torch.randn((1, count, 48) if with_batch else (count, 48))
            y = packed(x)
            assert y.is_contiguous(), "the compiled kernels read it by its address"
            torch.testing.assert_close(y, linear(x), atol=1e-5, rtol=1e-5)
    assert rows.seen == {8, 16, 24, 32, 40, 48, 56, 64, 128, 192, 2048}
