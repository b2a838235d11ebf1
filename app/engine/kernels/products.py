"""Products of packed weights with rows, by AMX or AVX-512's dot products; see `products.c`."""

import ctypes
import functools
import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.kernels.native import address, function_addresses, is_bf16, load_library

_SOURCE = Path(__file__).with_name("products.c")
_PANEL = 32
"""Outputs that are computed together."""


class Products:
    def __init__(self, library: ctypes.CDLL, *, use_tiles: bool = True) -> None:
        i64, pointer = ctypes.c_int64, ctypes.c_void_p
        library.multiply_bf16.argtypes = [pointer, i64, i64, pointer, pointer, pointer, i64, pointer]
        library.multiply_bytes.argtypes = [pointer, i64, i64, *[pointer] * 6, i64, ctypes.c_int, pointer]
        library.multiply_nf4.argtypes = [pointer, i64, i64, *[pointer] * 4, i64, ctypes.c_int, pointer]
        library.multiply_bf16.restype = library.multiply_bytes.restype = library.multiply_nf4.restype = None
        library.bytes_of_room.argtypes, library.bytes_of_room.restype = [i64, i64, ctypes.c_int], i64
        self._library = library
        kinds = library.prepare_products(use_tiles)
        self.of_bf16, self.of_bytes = bool(kinds & 1), bool(kinds & 2)
        """What can be multiplied here; the methods below count on it."""
        self.uses_tiles = bool(library.uses_tiles())
        self._of_thread = threading.local()

    def addresses(self) -> dict[str, int | None]:
        """Of the functions that other C calls."""
        return function_addresses(self._library, "multiply_bf16", "multiply_bytes", "multiply_nf4")

    def multiply(self, x: Tensor, weights: "PackedWeights") -> Tensor:
        """bf16 [rows, out] of bf16 `x` [rows, in]. A row's result does not depend on the others, but with AMX on
        whether there are any."""
        x = x.contiguous()
        y = x.new_empty(len(x), weights.out_features)
        self._library.multiply_bf16(
            x.data_ptr(), *x.shape, weights.packed.data_ptr(), address(weights.bias), y.data_ptr(),
            weights.out_features, self._room(x),
        )  # fmt: skip
        return y

    def multiply_bytes(self, x: Tensor, steps: Tensor, weights: "PackedBytes", dtype: torch.dtype) -> Tensor:
        """[rows, out] in `dtype` of uint8 `x` [rows, in], from which the weights' `zero` is taken and which is then
        multiplied by `steps` fp32 [rows]. Integers are summed exactly."""
        y = torch.empty(len(x), weights.out_features, dtype=dtype)
        self._library.multiply_bytes(
            x.data_ptr(), *x.shape, weights.packed.data_ptr(), address(weights.bias), weights.scale.data_ptr(),
            weights.shifts.data_ptr(), steps.data_ptr(), y.data_ptr(), weights.out_features, is_bf16(y), self._room(x),
        )  # fmt: skip
        return y

    def multiply_nf4(self, x: Tensor, weights: "PackedNf4Weights") -> Tensor:
        """[rows, out] of `x` [rows, in], likewise; fp32 is rounded to bf16, and the results are not."""
        x = x.contiguous()
        y = x.new_empty(len(x), weights.out_features)
        self._library.multiply_nf4(
            x.data_ptr(), *x.shape, weights.packed.data_ptr(), address(weights.bias), weights.scale.data_ptr(),
            y.data_ptr(), weights.out_features, is_bf16(y), self._room(x, is_nf4=True),
        )  # fmt: skip
        return y

    def _room(self, x: Tensor, *, is_nf4: bool = False) -> int:
        return self.room(len(x), x.shape[1] * x.element_size(), is_nf4=is_nf4)

    def room(self, num_rows: int, row_bytes: int, *, is_nf4: bool = False) -> int:
        """The address of memory for rows in tiles and, for NF4, weights that are looked up; kept from call to call: to
        get it anew would cost more than to fill it."""
        size = self._library.bytes_of_room(num_rows, row_bytes, is_nf4)
        room: Tensor | None = getattr(self._of_thread, "room", None)
        if room is None or room.numel() < size:
            room = self._of_thread.room = torch.empty(size, dtype=torch.uint8)
        return room.data_ptr()


class PackedWeights:
    """bf16 `weight` [out, in] and `bias` [out], as `Products.multiply` reads them."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features = len(weight)
        self.packed = _pack(weight, neighbours=2)
        self.bias = None if bias is None else _filled_up(bias.float())


class PackedBytes:
    """int8 `codes` [out, in], `scale` and `bias` fp32 [out], as `Products.multiply_bytes` reads them; `zero` is what
    stands for 0 in its inputs."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, *, zero: int) -> None:
        self.out_features = len(codes)
        self.packed = _pack(codes, neighbours=4)
        self.scale = _filled_up(scale.float())
        self.shifts = _filled_up(zero * codes.sum(dim=1, dtype=torch.int32))
        self.bias = None if bias is None else _filled_up(bias.float())


class PackedNf4Weights:
    """`codes` uint8 [out, in], each of 4 bits, `absmax` fp32 [out, in / 32], by which 32 of them are multiplied, and
    `bias` [out], as `Products.multiply_nf4` reads them."""

    def __init__(self, codes: Tensor, absmax: Tensor, bias: Tensor | None) -> None:
        self.out_features = len(codes)
        # What is left of a row's maxima beside the largest fits fp16, whatever they are.
        scale = absmax.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        scales = F.pad((absmax / scale.unsqueeze(1)).half(), (0, 0, 0, -len(codes) % _PANEL))
        scales = scales.view(-1, _PANEL, scales.shape[1]).transpose(1, 2).contiguous()  # [panels, depth, outputs]
        tiles = _pack(codes, neighbours=2).flatten(4)  # [panels, depth, 2, lines, outputs and neighbours]
        fours = tiles.view(*tiles.shape[:3], 4, 4, 32).to(torch.int32)  # of lines
        words = (fours << torch.arange(0, 16, 4).view(4, 1)).sum(dim=-2)  # four codes each, none in another's bits
        packed = words.to(torch.int16).flatten(2).view(torch.uint8), scales.view(torch.uint8)
        self.packed = torch.cat(packed, dim=2).contiguous()  # [panels, depth, bytes]
        self.scale = _filled_up(scale)
        self.bias = None if bias is None else _filled_up(bias.float())


@functools.cache
def products() -> Products | None:
    """None where neither bf16 nor bytes can be multiplied: for want of instructions, or of a compiler."""
    if not torch.cpu._is_avx512_supported():
        return None
    library = load_library(_SOURCE)
    found = None if library is None else Products(library)
    return found if found and (found.of_bf16 or found.of_bytes) else None


def _pack(weight: Tensor, *, neighbours: int) -> Tensor:
    """Panels of two tiles of 16 outputs side by side, as `products.c` says; zeros fill them up."""
    inputs = 16 * neighbours
    filled = F.pad(weight.detach(), (0, -weight.shape[1] % inputs, 0, -len(weight) % _PANEL))
    panels = filled.view(len(filled) // _PANEL, 2, 16, filled.shape[1] // inputs, 16, neighbours)
    return panels.permute(0, 3, 1, 4, 2, 5).contiguous()  # [panels, depth, 2, lines, outputs, neighbours]


def _filled_up(of_outputs: Tensor) -> Tensor:
    return F.pad(of_outputs.detach(), (0, -len(of_outputs) % _PANEL)).contiguous()
