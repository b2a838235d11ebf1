"""The places of the base's layers, where deltas differ from it."""

from weakref import WeakKeyDictionary

from torch import Tensor, nn

from app.engine.kernels import Kernels, LoraRows
from app.methods.lora import LoraLinear
from app.methods.over_base import updated


class Site(nn.Module):
    """A layer of the base, and what the deltas of the current step make of its result."""

    def __init__(self, base: nn.Module, kernels: Kernels | None) -> None:
        super().__init__()
        self.base = base
        self._kernels = kernels
        self._active: list[tuple[slice, nn.Module]] = []
        self._lora_rows: LoraRows | None = None
        self._is_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        """Of layers that were active before: to look takes longer than to add the update."""

    def activate(self, active: list[tuple[slice, nn.Module]]) -> None:
        self._active = active
        self._lora_rows = None
        if self._kernels is not None and active and all(self._is_plain_lora(layer) for _, layer in active):
            self._lora_rows = self._kernels.lora_rows(active)

    def _is_plain_lora(self, layer: nn.Module) -> bool:
        """Whether it is the base and a low-rank update, and nothing else."""
        if layer not in self._is_plain:
            self._is_plain[layer] = is_low_rank(layer, self.base)
        return self._is_plain[layer]

    @property
    def is_active(self) -> bool:
        return bool(self._active)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        self.update(x[0], y[0])
        return y

    def update(self, x: Tensor, y: Tensor) -> None:
        """`y` [rows, out], what the base makes of `x` [rows, in], becomes what each row's own delta does."""
        if self._lora_rows is not None:
            self._lora_rows.add(x, y)
            return
        for rows, layer in self._active:
            y[rows] = updated(layer, self.base, x[rows], y[rows])


def is_low_rank(layer: nn.Module, base: nn.Module) -> bool:
    """Whether `layer` is `base` and a low-rank update of what it makes, and nothing else."""
    return type(layer) is LoraLinear and not differs(layer.base, base)


def differs(layer: nn.Module, base: nn.Module) -> bool:
    """Whether `layer` has tensors that are not the base's."""
    shared = {tensor.data_ptr() for tensor in [*base.parameters(), *base.buffers()]}
    return any(tensor.data_ptr() not in shared for tensor in [*layer.parameters(), *layer.buffers()])
