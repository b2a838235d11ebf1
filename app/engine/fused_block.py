"""A block of the decoder on a CPU in fewer passes over its rows: norms, GELU and the rounding for int8 in one each."""

from typing import Any, Literal

from torch import Tensor, nn

from app.engine.kernels import Before, Kernels
from app.engine.kernels.blocks import Product
from app.engine.packing import PackedInt8, PackedLinear, PackedNf4
from app.engine.site import Site
from app.models.decoder import Block, rotate
from app.models.kernels.gelu import gelu


class FusedBlock(nn.Module):
    """Computes what `block` does, whose layers are sites; `x` is overwritten. The last block ends with those rows alone
    that `context.needed` names, if it does: of a prompt, one."""

    def __init__(self, block: Block, kernels: Kernels, *, is_last: bool) -> None:
        super().__init__()
        attn, mlp, sites = block.attn, block.mlp, dict(block.named_modules())
        self._layer, self._heads, self._head_width = attn.layer, attn.heads, attn.head_width
        self._is_last = is_last
        self._activation = None if mlp.activation is gelu else mlp.activation
        self._qkv = _Product(kernels, sites["attn_norm"], sites["attn.qkv"])
        self._out = _Product(kernels, None, sites["attn.out"])
        self._up = _Product(kernels, sites["mlp_norm"], sites["mlp.up"])
        self._down = _Product(kernels, "gelu" if self._activation is None else None, sites["mlp.down"])

    @property
    def is_plain_after_attention(self) -> bool:
        """Whether no delta's rows are told apart there."""
        return all(product.is_plain for product in (self._out, self._up, self._down))

    def described(self) -> tuple[Product, Product, Product, Product] | None:
        """For `CompiledBlocks`; None where it does something else."""
        products = [product.described() for product in (self._qkv, self._out, self._up, self._down)]
        return None if self._activation is not None or None in products else tuple(products)  # type: ignore[return-value]

    def forward(self, x: Tensor, context: Any, rotation: Any) -> Tensor:
        """As `Block`'s, of one row of tokens [1, time, width]."""
        rows = x[0]
        heads = self._qkv(rows).view(1, len(rows), -1, self._head_width).transpose(1, 2)
        q, k, v = heads.split(self._heads, dim=1)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = context.attend(self._layer, q, k, v)[0].transpose(0, 1).flatten(1)
        if self._is_last and context.needed is not None:
            rows, mixed = rows[context.needed], mixed[context.needed]
        hidden = self._up(rows, self._out(mixed))
        if self._activation is not None:
            hidden = self._activation(hidden)
        rows += self._down(hidden)
        return rows.unsqueeze(0)


class _Product:
    """A linear layer and what comes right before it."""

    def __init__(self, kernels: Kernels, before: nn.Module | Literal["gelu"] | None, layer: nn.Module) -> None:
        assert isinstance(layer, Site)
        self._kernels, self._layer = kernels, layer
        self._norm = before if isinstance(before, Site) else None
        self._before = Before(before.base if isinstance(before, Site) else before)
        self._rounded = layer.base if isinstance(layer.base, PackedInt8) else None

    @property
    def is_plain(self) -> bool:
        """Whether no delta's rows are told apart here."""
        return not self._layer.is_active and not self._is_norm_changed

    @property
    def _is_norm_changed(self) -> bool:
        return self._norm is not None and self._norm.is_active

    def described(self) -> Product | None:
        base = self._layer.base
        return base.described(self._before) if isinstance(base, PackedLinear | PackedInt8 | PackedNf4) else None

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """[rows, out] of `x` [rows, in], to which `added` is added first, in place."""
        layer, rounded, norm = self._layer, self._rounded, self._norm
        is_changed = self._is_norm_changed
        values, integers, steps = self._kernels.prepare(
            x,
            self._before,
            added,
            has_values=rounded is None or layer.is_active or is_changed,
            levels=None if rounded is None or is_changed else rounded.levels,
        )
        if norm is not None and is_changed:
            norm.update(x, values)
            if rounded is not None:
                integers, steps = self._kernels.round_rows(values, rounded.levels)
        y = layer.base(values) if rounded is None else rounded.of_rounded(integers, steps, x.dtype)
        layer.update(values, y)
        return y


def fused(block: nn.Module, kernels: Kernels | None, *, is_last: bool) -> FusedBlock | None:
    """None where there are no kernels for it, or its layers are no sites."""
    if kernels is None or not isinstance(block, Block):
        return None
    sites = dict(block.named_modules())
    names = ("attn_norm", "attn.qkv", "attn.out", "mlp_norm", "mlp.up", "mlp.down")
    return FusedBlock(block, kernels, is_last=is_last) if all(isinstance(sites[name], Site) for name in names) else None
