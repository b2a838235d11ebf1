"""A decoder's blocks in one call, for rows that at most low-rank updates tell apart; see `blocks.c`."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.engine.kernels import FORMATS, Before, CachedLayer, Kernels, group_of_row, lora_factors
from app.engine.kernels.products import PackedBytes, PackedNf4Weights, PackedWeights, Products
from app.models.kernels.native import address, is_bf16, load_library

_SOURCE = Path(__file__).with_name("blocks.c")
_ONE_ROW, _BF16, _BYTES, _NF4 = range(4)
_i64, _f64, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Functions(ctypes.Structure):
    _fields_ = _fields(
        _pointer,
        "embed_rows prepare_rows write_cache attend multiply_row multiply_bf16 multiply_bytes multiply_nf4 add_lora",
    )


class _Passage(ctypes.Structure):
    _fields_ = _fields(_i64, "kind") + _fields(_pointer, "weight bias") + _fields(_f64, "epsilon")

    @classmethod
    def of(cls, before: Before) -> "_Passage":
        return cls(before.kind, before.weight, before.bias, before.epsilon)


class Product(ctypes.Structure):
    """A linear layer and what comes right before it."""

    _fields_ = (
        _fields(_Passage, "before")
        + _fields(_i64, "kind inputs outputs levels")
        + _fields(_pointer, "weights bias scales shifts")
    )

    @classmethod
    def of_row(cls, before: Before, weight: Tensor, bias: Tensor | None) -> "Product":
        """With plain weights in fp32, of a single row."""
        return cls._of(before, _ONE_ROW, weight.shape, address(weight), address(bias))

    @classmethod
    def of_bf16(cls, before: Before, weight: Tensor, packed: PackedWeights) -> "Product":
        return cls._of(before, _BF16, weight.shape, address(packed.packed), address(packed.bias))

    @classmethod
    def of_bytes(cls, before: Before, codes: Tensor, packed: PackedBytes, *, levels: int) -> "Product":
        product = cls._of(before, _BYTES, codes.shape, address(packed.packed), address(packed.bias))
        product.levels, product.scales, product.shifts = levels, address(packed.scale), address(packed.shifts)
        return product

    @classmethod
    def of_nf4(cls, before: Before, shape: tuple[int, int], packed: PackedNf4Weights) -> "Product":
        """`shape` is (out, in)."""
        product = cls._of(before, _NF4, shape, address(packed.packed), address(packed.bias))
        product.scales = address(packed.scale)
        return product

    @classmethod
    def _of(cls, before: Before, kind: int, shape: tuple[int, ...], weights: int | None, bias: int | None) -> "Product":
        product = cls(before=_Passage.of(before), kind=kind, weights=weights, bias=bias)
        product.outputs, product.inputs = shape
        return product


class _Block(ctypes.Structure):
    _fields_ = _fields(Product, "qkv out up down") + _fields(_pointer, "keys values key_steps value_steps")


class _Ends(ctypes.Structure):
    _fields_ = _fields(_pointer, "tokens places") + _fields(_i64, "width") + _fields(_Passage, "norm")


class _Step(ctypes.Structure):
    _fields_ = (
        _fields(_i64, "num_rows is_bf16 heads kv_heads head_width cache_format table_width")
        + _fields(_f64, "scale")
        + _fields(_pointer, "ids places blocks offsets rows seen table_of_row tables")
        + _fields(_pointer, "x normed qkv mixed hidden added prepared integers steps room updates of_updates")
    )


class LowRank:
    """What a delta adds to the blocks' products: of each block's qkv, out, up and down a LoRA, or None."""

    def __init__(self, layers: Sequence[Any]) -> None:
        held = [None if layer is None else lora_factors(layer) for layer in layers]
        self._held = held  # whose addresses these are
        pointers = [(0, 0) if factors is None else tuple(map(address, factors)) for factors in held]
        self.a, self.b = (torch.tensor(each) for each in zip(*pointers, strict=True))
        self.ranks = torch.tensor([0 if layer is None else len(layer.lora_a) for layer in layers])
        self.scales = torch.tensor([0 if layer is None else layer.scale for layer in layers], dtype=torch.float32)


class Updates:
    """Those of a step: each delta's, for its rows; where there are none, none."""

    def __init__(self, groups: Sequence[tuple[slice, LowRank]]) -> None:
        self.address: int | None = None
        if not groups:
            return
        deltas = [delta for _, delta in groups]
        rows = group_of_row([rows for rows, _ in groups])
        a, b, ranks, scales = (
            torch.stack([getattr(delta, name) for delta in deltas], dim=1) for name in ("a", "b", "ranks", "scales")
        )  # [products, deltas]
        table = torch.empty(len(a), 6, dtype=torch.int64)  # of `update`s
        table[:, 0] = torch.where(ranks.any(dim=1), len(rows), 0)
        table[:, 1] = rows.data_ptr()
        for column, of_products in enumerate((a, b, ranks, scales), 2):
            size = of_products[0].nbytes
            table[:, column] = of_products.data_ptr() + size * torch.arange(len(table))
        self.address = table.data_ptr()
        self._held = (deltas, rows, a, b, ranks, scales, table)


class CompiledBlocks:
    """The embeddings of tokens and places, [vocab_size, width] and [places, width]; blocks of (qkv, out, up, down), and
    each one's part of the cache; and the norm behind them."""

    def __init__(
        self,
        library: ctypes.CDLL,
        kernels: Kernels,
        products: Products | None,
        blocks: Sequence[tuple[Product, Product, Product, Product]],
        cached: Sequence[CachedLayer],
        *,
        embeddings: tuple[Tensor, Tensor],
        norm: Before,
        heads: int,
    ) -> None:
        self._run = library.run_blocks
        self._run.argtypes, self._run.restype = [_pointer, _pointer, _pointer, _i64, _pointer], None
        self._embeddings, self._norm = embeddings, norm  # whose addresses these are
        self._ends = _Ends(*map(address, embeddings), embeddings[0].shape[1], _Passage.of(norm))
        self._functions = _Functions(**kernels.addresses(), **(products.addresses() if products else {}))
        self._products = products
        described = []
        for of_block, layer in zip(blocks, cached, strict=True):
            parts = layer.keys, layer.values, layer.key_steps, layer.value_steps
            described.append(_Block(*of_block, *map(address, parts)))
        self._blocks = (_Block * len(described))(*described)
        self._has_nf4 = any(product.kind == _NF4 for of_block in blocks for product in of_block)
        self._is_of_one_row = any(product.kind == _ONE_ROW for of_block in blocks for product in of_block)
        qkv, _, up, _ = blocks[0]
        self._most_of_update = max(product.inputs + product.outputs for product in blocks[0])
        self._width, self._hidden = qkv.inputs, up.outputs
        self._keys, self._kv_heads = cached[0].keys, cached[0].keys.shape[1]
        self._heads, self._head_width = heads, qkv.outputs // (heads + 2 * self._kv_heads)

    def __len__(self) -> int:
        return len(self._blocks)

    def can_run(self, num_rows: int) -> bool:
        return num_rows == 1 or not self._is_of_one_row

    def run(
        self, ids: Tensor, places: Tensor, count: int, *, is_normed: bool, blocks: Tensor, offsets: Tensor,
        rows: Tensor, seen: Tensor, tables: Tensor, table_of_row: Tensor, updates: Updates,
    ) -> Tensor:  # fmt: skip
        """[rows, width] of the tokens `ids` [rows] at `places` [rows], both int64, through the first `count` blocks,
        and the norm, if `is_normed`; the others as `Kernels.write` and `Kernels.attend` take them, of as many rows."""
        num_rows, width, heads = len(ids), self._width, self._heads
        x = self._embeddings[0].new_empty(num_rows, width)
        normed = torch.empty_like(x) if is_normed else None
        of_attention = heads * self._head_width
        room: list[Any] = [
            x.new_empty(num_rows, columns)
            for columns in (of_attention + 2 * self._kv_heads * self._head_width, of_attention, self._hidden, width)
        ]
        most = max(width, of_attention, self._hidden)
        room += [x.new_empty(num_rows, most), x.new_empty(num_rows, most, dtype=torch.uint8)]
        room += [x.new_empty(num_rows, dtype=torch.float32)]
        of_updates = torch.empty(num_rows * self._most_of_update) if updates.address and is_bf16(x) else None
        of_step = (ids, places, blocks, offsets, rows, seen, table_of_row, tables, x, normed, *room)
        step = _Step(
            num_rows, is_bf16(x), heads, self._kv_heads, self._head_width, FORMATS[self._keys.dtype], tables.shape[1],
            self._head_width**-0.5, *map(address, of_step),
            self._products.room(num_rows, most * x.element_size(), is_nf4=self._has_nf4) if self._products else None,
            updates.address, address(of_updates),
        )  # fmt: skip
        address_of = ctypes.addressof
        self._run(
            address_of(self._functions), address_of(self._ends), address_of(self._blocks), count, address_of(step)
        )
        return x if normed is None else normed


def library_of_blocks() -> ctypes.CDLL | None:
    return load_library(_SOURCE)
