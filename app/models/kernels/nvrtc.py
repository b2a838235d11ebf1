"""CUDA C++ to a kernel at run time, with NVRTC: the compiler that comes with torch's wheel, so nvcc is not needed.

`torch.cuda._compile_kernel` does nearly this, but asks for an installed CUDA toolkit's headers. Sources given here
must include none.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

Kernel = Callable[..., None]
"""Called with `grid`, `block` and `args`; tensors are passed as pointers, Python's integers as 32-bit ones."""


def load_kernels(source: str, names: Sequence[str], device: torch.device) -> list[Kernel]:
    """The kernels `names` (declared `extern "C"`) of `source`, compiled for `device` and loaded there.

    Raises:
        OSError: there is no NVRTC or no driver.
        RuntimeError: NVRTC or the driver refuses; with the compiler's log.
    """
    from torch.cuda._utils import _cuda_load_module

    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability(device)
        loaded: Any = _cuda_load_module(compile_source(source, f"sm_{major}{minor}"), list(names))
    return [_with_context(loaded[name], device) for name in names]


_threads = threading.local()


def _with_context(kernel: Kernel, device: torch.device) -> Kernel:
    """`kernel`, for any thread. The driver launches in the thread's current context; torch's own calls have made the
    device's current, but autograd's thread may not have made one yet."""

    def launch(**arguments: Any) -> None:
        known = _threads.__dict__.setdefault("devices", set())
        if device not in known:
            torch.zeros(1, device=device)
            known.add(device)
        kernel(**arguments)

    return launch


def compile_source(source: str, architecture: str) -> bytes:
    """The cubin of `source` for `architecture`, as in sm_90. Needs no GPU."""
    from torch.cuda._utils import _get_nvrtc_library

    nvrtc = _get_nvrtc_library()
    program = ctypes.c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--std=c++17")
        if nvrtc.nvrtcCompileProgram(program, len(options), options) != 0:
            log = _read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"NVRTC does not compile the kernel for {architecture}: {log}")
        return _read(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, part: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, nvrtc[f"nvrtcGet{part}Size"](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, nvrtc[f"nvrtcGet{part}"](program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status != 0:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")
