"""The engine's own CPU kernels: compiled with the machine's C compiler at first use, called without torch's dispatcher.

Where there is no compiler, or a model's shapes do not suit them, the engine computes the same with torch.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from app.models.decoder import DecoderConfig
from app.models.kernels.native import DTYPES, address, function_addresses, is_bf16, load_library

_SOURCE = Path(__file__).with_name("cpu.c")
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""What the cache may hold, as `cpu.c` numbers it."""
_NOTHING = torch.empty(0)  # its address is a null pointer


@dataclass(frozen=True)
class CachedLayer:
    """One layer's keys [blocks, kv_heads, head_width, 16] and values [blocks, kv_heads, 16, head_width]; in int8 these
    are multiples of steps, fp32 [blocks, kv_heads, 16], keys [blocks, kv_heads, head_width / 4, 16, 4] and values
    [blocks, kv_heads, 4, head_width, 4]."""

    keys: Tensor
    values: Tensor
    key_steps: Tensor | None = None
    value_steps: Tensor | None = None


class Kernels:
    """Activations are fp32 or bf16, and in each call all of the same."""

    def __init__(self, library: ctypes.CDLL) -> None:
        i64, i32, f32, pointer, flag = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
        arguments: dict[str, list[Any]] = {
            "attend": [pointer, pointer, flag, *[i64] * 4, *[pointer] * 4, flag, *[pointer] * 4, *[i64] * 5, f32],
            "write_cache": [
                pointer,
                i64,
                i64,
                pointer,
                i64,
                i64,
                flag,
                *[pointer] * 4,
                flag,
                pointer,
                pointer,
                *[i64] * 3,
            ],
            "add_lora": [pointer, i64, pointer, i64, flag, pointer, pointer, i64, *[pointer] * 4],
            "multiply_row": [pointer, i64, pointer, pointer, pointer, i64],
            "prepare_rows": [flag, pointer, pointer, flag, pointer, pointer, f32, *[pointer] * 3, i64, i64, i32],
            "scale_rows": [pointer, pointer, pointer, pointer, flag, i64, i64],
            "largest_of_rows": [pointer, flag, pointer, i64, i64],
        }
        for name, types in arguments.items():
            getattr(library, name).argtypes, getattr(library, name).restype = types, None
        self._library = library

    def addresses(self) -> dict[str, int | None]:
        """Of the functions that other C calls."""
        names = "embed_rows", "prepare_rows", "write_cache", "attend", "multiply_row", "add_lora"
        return function_addresses(self._library, *names)

    def attend(
        self, q: Tensor, cached: CachedLayer, out: Tensor, *, rows: Tensor, seen: Tensor, tables: Tensor,
        table_of_row: Tensor,
    ) -> None:  # fmt: skip
        """Into `out` [heads, rows, head_width], of `q` likewise, for those in `rows` int64 [n]: each over the first
        `seen` int64 [n] places of the sequence with the blocks `tables[table_of_row]`, int32 [sequences, blocks] and
        int64 [n]."""
        keys, width = cached.keys, q.shape[2]
        self._library.attend(
            q.data_ptr(), out.data_ptr(), is_bf16(q), q.stride(1), q.stride(0), out.stride(1), out.stride(0),
            keys.data_ptr(), cached.values.data_ptr(), address(cached.key_steps), address(cached.value_steps),
            FORMATS[keys.dtype], rows.data_ptr(), seen.data_ptr(), table_of_row.data_ptr(), tables.data_ptr(),
            tables.shape[1], len(rows), q.shape[0], keys.shape[1], width, width**-0.5,
        )  # fmt: skip

    def write(self, k: Tensor, v: Tensor, cached: CachedLayer, *, blocks: Tensor, offsets: Tensor) -> None:
        """The first rows of `k` and `v` [kv_heads, rows, head_width] into places `offsets` of `blocks`, both int64, as
        many as these are."""
        keys = cached.keys
        kv_heads, _, width = k.shape
        self._library.write_cache(
            k.data_ptr(), k.stride(1), k.stride(0), v.data_ptr(), v.stride(1), v.stride(0), is_bf16(k),
            keys.data_ptr(), cached.values.data_ptr(), address(cached.key_steps), address(cached.value_steps),
            FORMATS[keys.dtype], blocks.data_ptr(), offsets.data_ptr(), blocks.shape[0], kv_heads, width,
        )  # fmt: skip

    def multiply_row(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., out] of `x` [..., in], one row, `weight` [out, in] and `bias` [out], all fp32 and contiguous."""
        out_features, in_features = weight.shape
        y = x.new_empty(*x.shape[:-1], out_features)
        self._library.multiply_row(
            x.data_ptr(), in_features, weight.data_ptr(), address(bias), y.data_ptr(), out_features
        )
        return y

    def prepare(
        self, x: Tensor, before: "Before", added: Tensor | None, *, has_values: bool, levels: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [rows, width], contiguous, as a product takes it: with `added` likewise added to it, in place, and then
        through what comes `before`. Returns that, and as `round_rows` rounds it; empty what was not asked for."""
        if before.kind == 0 and added is None and levels is None:
            return x, _NOTHING, _NOTHING
        out = torch.empty_like(x) if has_values else _NOTHING
        integers, steps = _NOTHING, _NOTHING
        if levels is not None:
            integers, steps = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape[0])
        self._library.prepare_rows(
            before.kind, x.data_ptr(), address(added), is_bf16(x), before.weight, before.bias, before.epsilon,
            out.data_ptr(), integers.data_ptr(), steps.data_ptr(), *x.shape, levels or 0,
        )  # fmt: skip
        return out, integers, steps

    def round_rows(self, x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """`x` [rows, in], contiguous, as integers from -levels to levels, uint8 [rows, in] with `levels + 1` added, and
        fp32 [rows], by which they are to be multiplied."""
        _, integers, steps = self.prepare(x, _AS_IT_IS, None, has_values=False, levels=levels)
        return integers, steps

    def scale_rows(self, y: Tensor, steps: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`y` [rows, out] times `steps` [rows], plus `bias` [out], all fp32, in `dtype`; `y` may be overwritten."""
        out = y if dtype == torch.float32 else torch.empty_like(y, dtype=dtype)
        self._library.scale_rows(y.data_ptr(), steps.data_ptr(), address(bias), out.data_ptr(), is_bf16(out), *y.shape)
        return out

    def argmax(self, x: Tensor) -> Tensor:
        """int64 [rows]: the place of the largest in each row of `x` [rows, width], contiguous; the first of equals."""
        places = torch.empty(len(x), dtype=torch.int64)
        self._library.largest_of_rows(x.data_ptr(), is_bf16(x), places.data_ptr(), *x.shape)
        return places

    def lora_rows(self, active: Sequence[tuple[slice, Any]]) -> "LoraRows":
        return LoraRows(self._library.add_lora, active)


class Before:
    """What rows go through before a product: a norm, GELU, or nothing."""

    def __init__(self, module: nn.Module | Literal["gelu"] | None) -> None:
        self.kind, self.epsilon = 0 if module is None else 3, 0.0
        self.weight = self.bias = None  # addresses; to ask for them in each step takes longer than to read them
        if isinstance(module, nn.Module):
            assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
            self._held = module
            self.kind = 1 if isinstance(module, nn.LayerNorm) else 2
            self.weight, self.bias = address(module.weight), address(getattr(module, "bias", None))
            self.epsilon = torch.finfo(module.weight.dtype).eps if module.eps is None else module.eps


_AS_IT_IS = Before(None)


class LoraRows:
    """The updates of several `LoraLinear`s over one base, each for its rows."""

    def __init__(self, add: Any, active: Sequence[tuple[slice, Any]]) -> None:
        self._add = add
        layers = [layer for _, layer in active]
        self._held = [lora_factors(layer) for layer in layers]
        self._a = torch.tensor([a.data_ptr() for a, _ in self._held])
        self._b = torch.tensor([b.data_ptr() for _, b in self._held])
        self._ranks = torch.tensor([layer.lora_a.shape[0] for layer in layers])
        self._scales = torch.tensor([layer.scale for layer in layers], dtype=torch.float32)
        self._group_of_row = group_of_row([rows for rows, _ in active])

    def add(self, x: Tensor, y: Tensor) -> None:
        """To `y` [rows, out], of `x` [rows, in]; both contiguous."""
        rows = len(self._group_of_row)
        room = torch.empty(rows * (x.shape[1] + y.shape[1])) if is_bf16(x) else None
        self._add(
            x.data_ptr(), x.shape[1], y.data_ptr(), y.shape[1], is_bf16(x), address(room),
            self._group_of_row.data_ptr(), rows, self._a.data_ptr(), self._b.data_ptr(), self._ranks.data_ptr(),
            self._scales.data_ptr(),
        )  # fmt: skip


def group_of_row(groups: Sequence[slice]) -> Tensor:
    """int64 [rows]: in which of `groups` each row is, to the last that is in one; -1: in none."""
    numbers = [-1] * max(rows.stop for rows in groups)
    for number, rows in enumerate(groups):
        numbers[rows] = [number] * (rows.stop - rows.start)
    return torch.tensor(numbers)


def lora_factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A of a LoRA, and B as [rank, out], in fp32, kept with it."""
    kept = getattr(layer, "factors_for_kernels", None)
    if kept is None:
        kept = layer.lora_a.detach().float().contiguous(), layer.lora_b.detach().float().t().contiguous()  # type: ignore[operator]
        object.__setattr__(layer, "factors_for_kernels", kept)  # not as buffers: they are no state of its own
    return kept


def kernels_for(
    config: DecoderConfig, *, cache_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> Kernels | None:
    """The compiled kernels, where they can be had and know such a model."""
    is_known = device.type == "cpu" and dtype in DTYPES and cache_dtype in FORMATS
    if not is_known or config.head_width % 16 or config.head_width > 256:
        return None
    return _compiled()


@functools.cache
def _compiled() -> Kernels | None:
    library = load_library(_SOURCE)
    return None if library is None else Kernels(library)
