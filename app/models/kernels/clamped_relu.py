"""Clamped ReLU, min(max(x, 0), limit): a CUDA kernel of our own, and the torch function that defines it.

`F.hardtanh` defines values and gradient: 1 where 0 < x < limit, 0 at both bounds and beyond. NaN stays NaN; there the
kernel lets the gradient through.

The kernel saves its output for the backward pass, where `F.hardtanh` saves its input. The layer that follows saves
that same output, so the activation holds no memory of its own.
"""

import functools
import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from app.models.kernels.notices import say_once
from app.models.kernels.nvrtc import Kernel, load_kernels

LIMIT = 6.0

# The bits of IEEE floats without a sign, read as integers, are ordered as the numbers are. So the kernel computes on
# bits: one code for fp16 and bf16, no header, and a CPU can run it. Each thread moves packs of 16 bytes, the widest
# load there is; what is left, or all where a pointer is not aligned, goes element by element.
SOURCE = """
typedef unsigned short Bits16;
typedef unsigned int Bits32;

template <typename Bits> struct alignas(16) Pack {
    static const int lanes = 16 / sizeof(Bits);
    Bits lane[lanes];
};

template <typename Bits> struct Clamp {
    Bits limit, infinity;
    __device__ Bits operator()(Bits x, Bits) const {
        const Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
        if (Bits(x & ~sign) > infinity) return x;  // NaN
        if (x & sign) return 0;
        return x < limit ? x : limit;
    }
};

template <typename Bits> struct Gate {  // y is 0 or limit exactly where the gradient is 0
    Bits limit;
    __device__ Bits operator()(Bits y, Bits gradient) const { return y != 0 && y != limit ? gradient : Bits(0); }
};

template <typename Bits, typename Function>
__device__ void map(const Bits* first, const Bits* second, Bits* result, int packs, int count, Function function) {
    typedef Pack<Bits> P;
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int stride = gridDim.x * blockDim.x;
    for (int i = thread; i < packs; i += stride) {
        const P a = reinterpret_cast<const P*>(first)[i];
        const P b = reinterpret_cast<const P*>(second)[i];
        P c;
        for (int lane = 0; lane < P::lanes; ++lane) c.lane[lane] = function(a.lane[lane], b.lane[lane]);
        reinterpret_cast<P*>(result)[i] = c;
    }
    for (int i = packs * P::lanes + thread; i < count; i += stride) result[i] = function(first[i], second[i]);
}

extern "C" __global__ void forward16(const Bits16* x, Bits16* y, int packs, int count, int limit, int infinity) {
    map(x, x, y, packs, count, Clamp<Bits16>{Bits16(limit), Bits16(infinity)});
}
extern "C" __global__ void forward32(const Bits32* x, Bits32* y, int packs, int count, int limit, int infinity) {
    map(x, x, y, packs, count, Clamp<Bits32>{Bits32(limit), Bits32(infinity)});
}
extern "C" __global__ void backward16(const Bits16* y, const Bits16* dy, Bits16* dx, int packs, int count, int limit) {
    map(y, dy, dx, packs, count, Gate<Bits16>{Bits16(limit)});
}
extern "C" __global__ void backward32(const Bits32* y, const Bits32* dy, Bits32* dx, int packs, int count, int limit) {
    map(y, dy, dx, packs, count, Gate<Bits32>{Bits32(limit)});
}
"""
NAMES = ("forward16", "forward32", "backward16", "backward32")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_PACK_BYTES = 16
_THREADS = 256
_MAX_BLOCKS = 2048  # fills any GPU of today; each thread strides over the rest
_MAX_COUNT = 2**30  # elements a launch: indices and strides stay below 2^31


def clamped_relu(x: Tensor, *, limit: float = LIMIT) -> Tensor:
    """min(max(x, 0), limit), elementwise; `limit` > 0 must be exact in x's dtype, as 6 is.

    On CUDA our kernel computes it in fp32, fp16 and bf16, elsewhere torch; so does torch within `torch.compile`,
    which fuses the activation with its neighbours, as it could not do with a kernel that it does not know.
    """
    assert limit > 0, limit
    if not torch.compiler.is_compiling() and (kernels := _kernels_for(x)):
        return cast(Tensor, _ClampedReLU.apply(x, limit, kernels))
    return F.hardtanh(x, 0.0, limit)


def version_on(device: torch.device) -> str:
    """What computes on `device`: our `cuda` kernel or `torch`."""
    return "cuda" if device.type == "cuda" and _compiled(device) else "torch"


class _ClampedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float, kernels: dict[str, Kernel]) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        ctx.limit, ctx.kernels = _bits(limit, x.dtype), kernels
        _launch(kernels[f"forward{8 * x.itemsize}"], [x, y], ctx.limit, _bits(float("inf"), x.dtype))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        grad_output = grad_output.contiguous()  # a sum's gradient is one expanded number
        grad_input = torch.empty_like(y)
        _launch(ctx.kernels[f"backward{8 * y.itemsize}"], [y, grad_output, grad_input], ctx.limit)
        return grad_input, None, None


def _launch(kernel: Kernel, tensors: list[Tensor], *numbers: int) -> None:
    """Run `kernel` over contiguous `tensors` of one size, the last of which it writes, in slices of `_MAX_COUNT`."""
    for slices in zip(*(tensor.view(-1).split(_MAX_COUNT) for tensor in tensors), strict=True):
        count = slices[0].numel()
        if count == 0:
            continue  # CUDA refuses a grid of no blocks
        is_aligned = all(part.data_ptr() % _PACK_BYTES == 0 for part in slices)
        packs = count * slices[0].itemsize // _PACK_BYTES if is_aligned else 0
        blocks = min(-(-(packs or count) // _THREADS), _MAX_BLOCKS)
        with torch.cuda.device_of(slices[0]):
            kernel(grid=(blocks, 1, 1), block=(_THREADS, 1, 1), args=[*slices, packs, count, *numbers])


def _kernels_for(x: Tensor) -> dict[str, Kernel] | None:
    """The kernels by name; None where torch must do, which is said once."""
    if not x.is_cuda:
        say_once(logging.INFO, f"clamped_relu: on {x.device.type}, torch computes it; the kernel is for CUDA")
        return None
    if x.dtype not in DTYPES:
        say_once(logging.INFO, f"clamped_relu: in {x.dtype}, torch computes it; the kernel is for fp32, fp16, bf16")
        return None
    return _compiled(x.device)


@functools.cache
def _compiled(device: torch.device) -> dict[str, Kernel] | None:
    try:
        return dict(zip(NAMES, load_kernels(SOURCE, NAMES, device), strict=True))
    except (OSError, RuntimeError, ImportError, AttributeError) as error:  # the last two: another torch's internals
        say_once(logging.WARNING, f"clamped_relu: no kernel for {device}, torch computes it; because: {error}")
        return None


@functools.cache
def _bits(number: float, dtype: torch.dtype) -> int:
    """The bits of `number` in `dtype`, as an integer."""
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    return int(torch.tensor(number, dtype=dtype).view(integer).item())
