"""The engine's own CPU kernels: compiled with the machine's C compiler at first use, called without torch's dispatcher.

Where there is no compiler, or a model's shapes do not suit them, the engine computes the same with torch.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.models.decoder import DecoderConfig

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-std=gnu11")
_DTYPES = (torch.float32, torch.bfloat16)


class Kernels:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend: Any = library.attend
        self._write: Any = library.write_cache
        self._add_lora: Any = library.add_lora
        i64, f32, pointer, flag = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
        rows: list[Any] = [pointer, i64, i64]  # where they begin, and how far apart rows and heads are
        self._attend.argtypes = [*rows, pointer, pointer, flag, *rows, *[pointer] * 4, *[i64] * 5, f32]
        self._write.argtypes = [*rows, *rows, pointer, pointer, flag, pointer, pointer, i64, i64, i64]
        self._add_lora.argtypes = [pointer, i64, pointer, i64, pointer, i64, *[pointer] * 4]
        self._multiply_row: Any = library.multiply_row
        self._multiply_row.argtypes = [pointer, i64, pointer, pointer, pointer, i64]
        for function in (self._attend, self._write, self._add_lora, self._multiply_row):
            function.restype = None

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, *, rows: Tensor, seen: Tensor, tables: Tensor,
        table_of_row: Tensor,
    ) -> None:  # fmt: skip
        """Into `out` [heads, rows, head_width], of `q` likewise, for those in `rows` int64 [n]: each over the first
        `seen` int64 [n] places of the sequence with the blocks `tables[table_of_row]`, int32 [sequences, blocks] and
        int64 [n]. `keys` and `values` are one layer's of `KVCache`."""
        num_blocks, kv_heads, width, _ = keys.shape
        self._attend(
            q.data_ptr(), q.stride(1), q.stride(0), keys.data_ptr(), values.data_ptr(), keys.dtype == torch.bfloat16,
            out.data_ptr(), out.stride(1), out.stride(0), rows.data_ptr(), seen.data_ptr(), table_of_row.data_ptr(),
            tables.data_ptr(), tables.shape[1], len(rows), q.shape[0], kv_heads, width, width**-0.5,
        )  # fmt: skip

    def write(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *, blocks: Tensor, offsets: Tensor) -> None:
        """`k` and `v` [rows, kv_heads, head_width] into places `offsets` of `blocks`, both int64 [rows]."""
        self._write(
            k.data_ptr(), k.stride(0), k.stride(1), v.data_ptr(), v.stride(0), v.stride(1), keys.data_ptr(),
            values.data_ptr(), keys.dtype == torch.bfloat16, blocks.data_ptr(), offsets.data_ptr(), *k.shape,
        )  # fmt: skip

    def multiply_row(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[1, 1, out] of `x` [1, 1, in], `weight` [out, in] and `bias` [out], all fp32 and contiguous."""
        out_features, in_features = weight.shape
        y = x.new_empty(*x.shape[:-1], out_features)
        place = None if bias is None else bias.data_ptr()
        self._multiply_row(x.data_ptr(), in_features, weight.data_ptr(), place, y.data_ptr(), out_features)
        return y

    def lora_rows(self, active: Sequence[tuple[slice, Any]]) -> "LoraRows":
        return LoraRows(self._add_lora, active)


class LoraRows:
    """The updates of several `LoraLinear`s over one base, each for its rows."""

    def __init__(self, add: Any, active: Sequence[tuple[slice, Any]]) -> None:
        self._add = add
        self._rows = [rows for rows, _ in active]
        layers = [layer for _, layer in active]
        self._held = [(layer.lora_a, _transposed(layer)) for layer in layers]
        self._a = torch.tensor([a.data_ptr() for a, _ in self._held])
        self._b = torch.tensor([b.data_ptr() for _, b in self._held])
        self._ranks = torch.tensor([layer.lora_a.shape[0] for layer in layers])
        self._scales = torch.tensor([layer.scale for layer in layers], dtype=torch.float32)
        self._group_of_row = torch.full((max(rows.stop for rows in self._rows),), -1)
        for group, rows in enumerate(self._rows):
            self._group_of_row[rows] = group

    def add(self, x: Tensor, y: Tensor) -> None:
        """To `y` [rows, out], of `x` [rows, in]; both fp32 and contiguous."""
        self._add(
            x.data_ptr(), x.shape[1], y.data_ptr(), y.shape[1], self._group_of_row.data_ptr(), len(self._group_of_row),
            self._a.data_ptr(), self._b.data_ptr(), self._ranks.data_ptr(), self._scales.data_ptr(),
        )  # fmt: skip


def _transposed(layer: nn.Module) -> Tensor:
    """B of a LoRA as [rank, out], kept with it."""
    kept = getattr(layer, "lora_b_transposed", None)
    if kept is None:
        kept = layer.lora_b.detach().t().contiguous()  # type: ignore[operator]
        object.__setattr__(layer, "lora_b_transposed", kept)  # not as a buffer: it is no state of its own
    return kept


def kernels_for(
    config: DecoderConfig, *, cache_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> Kernels | None:
    """The compiled kernels, where they can be had and know such a model."""
    is_known = device.type == "cpu" and dtype in _DTYPES and cache_dtype in _DTYPES
    if not is_known or config.head_width % 16 or config.head_width > 256:
        return None
    return _compiled()


@functools.cache
def _compiled() -> Kernels | None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        logger.warning("no C compiler is here: the engine computes attention with torch, which is slower")
        return None
    try:
        return Kernels(ctypes.CDLL(str(_library(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("the engine's kernels cannot be compiled (%s); it computes with torch, which is slower", reason)
        return None


def _library(compiler: str) -> Path:
    """The compiled file, of this source, compiler, processor and OpenMP."""
    openmp = _torch_openmp()
    identity = [_SOURCE.read_text(), " ".join(_FLAGS), compiler, str(openmp), _processor()]
    name = f"engine-{hashlib.sha256('|'.join(identity).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pacos"
    file = folder / name
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            made = Path(staging) / name
            # torch's own OpenMP, if it brings one: two of them would fight for the cores
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made), *([str(openmp)] if openmp else []), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.replace(file)
    return file


def _torch_openmp() -> Path | None:
    """The libgomp that torch is linked with, where its package has one."""
    folders = [Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs"]
    return next((file for folder in folders for file in sorted(folder.glob("libgomp*.so*"))), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
