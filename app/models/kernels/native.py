"""C, compiled with the machine's compiler at first use and kept for the next time: for what eager torch is slow at on a
CPU, called without its dispatcher. Where there is no compiler torch computes the same."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from app.models.kernels.notices import say_once

_HEADERS = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-std=gnu11")
DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels compute on."""


@functools.cache
def load_library(source: Path) -> ctypes.CDLL | None:
    """The compiled `source`; None where it cannot be had, which is said once."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        say_once(logging.WARNING, "no C compiler is here: torch computes what our kernels would, which is slower")
        return None
    try:
        return ctypes.CDLL(str(_compiled(source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        say_once(logging.WARNING, f"{source.name} cannot be compiled ({reason}); torch computes it, which is slower")
        return None


def is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def address(x: Tensor | None) -> int | None:
    """Of its numbers, as C takes it; a null pointer for None."""
    return None if x is None else x.data_ptr()


def function_addresses(library: ctypes.CDLL, *names: str) -> dict[str, int | None]:
    """Of functions that other C calls."""
    return {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names}


def _compiled(source: Path, compiler: str) -> Path:
    """The file, of this source, compiler, processor and OpenMP."""
    openmp = _torch_openmp()
    headers = [header.read_text() for header in sorted(_HEADERS.glob("*.h"))]
    identity = [source.read_text(), *headers, " ".join(_FLAGS), compiler, str(openmp), _processor()]
    name = f"{hashlib.sha256('|'.join(identity).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pacos"
    file = folder / name
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            made = Path(staging) / name
            # torch's own OpenMP, if it brings one: two of them would fight for the cores
            libraries = [*([str(openmp)] if openmp else []), "-lm"]
            command = [compiler, *_FLAGS, f"-I{_HEADERS}", str(source), "-o", str(made), *libraries]
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
