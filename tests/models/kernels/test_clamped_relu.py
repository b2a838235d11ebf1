"""The kernel's source is compiled for GPUs where a compiler is, and run on the CPU as C++; only a GPU runs the rest."""

import ctypes
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.kernels import clamped_relu as module
from app.models.kernels import notices, nvrtc
from app.models.kernels.clamped_relu import DTYPES, NAMES, SOURCE, clamped_relu

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SHIM = """
struct Index { int x; };
static thread_local Index blockIdx, threadIdx, blockDim, gridDim;
#define __global__
#define __device__
%s
#define RUN(name) extern "C" void run_##name
#define EACH(call) gridDim.x = blocks; blockDim.x = threads; \\
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) \\
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) call;
#define RUN_FORWARD(name, B) RUN(name)(int blocks, int threads, B* x, B* y, int packs, int count, int limit, int inf) \\
    { EACH(name(x, y, packs, count, limit, inf)) }
#define RUN_BACKWARD(name, B) RUN(name)(int blocks, int threads, B* y, B* d, B* r, int packs, int count, int limit) \\
    { EACH(name(y, d, r, packs, count, limit)) }
RUN_FORWARD(forward16, Bits16) RUN_FORWARD(forward32, Bits32)
RUN_BACKWARD(backward16, Bits16) RUN_BACKWARD(backward32, Bits32)
"""


@pytest.fixture(scope="module")
def cpu_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The kernels of the CUDA source by name, as C++ that loops over blocks and threads."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run the kernel's source on the CPU")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.cpp").write_text(SHIM % SOURCE)
    command = ["g++", "-std=c++17", "-O1", "-Wno-attributes", "-shared", "-fPIC", "shim.cpp", "-o", "shim.so"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    library = ctypes.CDLL(str(folder / "shim.so"))

    def runner(name: str) -> Any:
        def run(*, grid: tuple[int, ...], block: tuple[int, ...], args: list[Any]) -> None:
            pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in args]
            library[f"run_{name}"](grid[0], block[0], *pointers)

        return run

    return {name: runner(name) for name in NAMES}


def edge_cases(dtype: torch.dtype, *, device: str = "cpu") -> Tensor:
    """Random numbers, both bounds and their neighbours, infinities, NaN, subnormals: 1,003 of them."""
    inf = torch.tensor(float("inf"), dtype=dtype)
    bounds = torch.tensor([0.0, -0.0, 6.0, -6.0, float("nan"), -float("nan"), float("inf"), -float("inf")], dtype=dtype)
    neighbours = torch.stack([torch.nextafter(bounds[i], side) for i in (0, 2) for side in (inf, -inf)])
    noise = 5 * torch.randn(1003 - 12, generator=torch.Generator().manual_seed(0))
    return torch.cat([bounds, neighbours, noise.to(dtype)]).to(device)


def outputs(function: Any, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, gradient)[0]


def assert_same(function: Any, x: Tensor) -> None:
    """Equal, to the bit but for the sign of zero, to `F.hardtanh` in value and gradient."""
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    gradient = gradient.masked_fill(x.isnan(), 0)  # at NaN torch disagrees with itself: vectors block it, scalars pass
    actual, expected = (outputs(f, x, gradient) for f in (function, lambda t: F.hardtanh(t, 0.0, 6.0)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def with_kernels(kernels: dict[str, Any]) -> Any:
    return lambda x: module._ClampedReLU.apply(x, 6.0, kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_source_equals_hardtanh_in_value_and_gradient(cpu_kernels, dtype: torch.dtype) -> None:
    assert_same(with_kernels(cpu_kernels), edge_cases(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_strided_empty_and_single_tensors_are_right(cpu_kernels, dtype: torch.dtype) -> None:
    x = edge_cases(dtype)
    for view in (x[1:], x[3:4], x[:0], x[:1000].view(20, 50).T, x[::3], x[0]):
        assert_same(with_kernels(cpu_kernels), view)


def test_long_tensors_go_in_slices_over_few_blocks(cpu_kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_COUNT", 4096)
    monkeypatch.setattr(module, "_MAX_BLOCKS", 2)
    x = 5 * torch.randn(3 * 4096 + 77, generator=torch.Generator().manual_seed(2))
    assert_same(with_kernels(cpu_kernels), x)
    assert_same(with_kernels(cpu_kernels), x[1:])


def test_the_kernel_refuses_a_second_derivative(cpu_kernels) -> None:
    x = torch.ones(8, requires_grad=True)
    y = with_kernels(cpu_kernels)(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_kernel_keeps_its_output_and_not_its_input(cpu_kernels) -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = with_kernels(cpu_kernels)(torch.ones(8, requires_grad=True) * 1)
    assert [tensor.data_ptr() for tensor in saved] == [y.data_ptr()]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_the_source(tmp_path: Path, architecture: str) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    (tmp_path / "kernel.cu").write_text(SOURCE)
    command = ["nvcc", "-cubin", f"-arch={architecture}", "-Werror", "all-warnings", "kernel.cu", "-o", "kernel.cubin"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    cubin = (tmp_path / "kernel.cubin").read_bytes()
    assert all(name.encode() in cubin for name in NAMES)


@pytest.fixture
def with_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC needs no GPU, but torch looks for the version it was built with; a torch for CPU has none."""
    if torch.version.cuda is None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    try:
        torch.cuda._utils._get_nvrtc_library()
    except OSError:
        pytest.skip("needs NVRTC, which comes with torch for CUDA")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvrtc_compiles_the_source_at_run_time(with_nvrtc: None, architecture: str) -> None:
    cubin = nvrtc.compile_source(SOURCE, architecture)
    assert all(name.encode() in cubin for name in NAMES)


def test_nvrtc_tells_what_is_wrong_with_a_source(with_nvrtc: None) -> None:
    with pytest.raises(RuntimeError, match="sm_90.*identifier.*is undefined"):
        nvrtc.compile_source('extern "C" __global__ void f() { nothing(); }', "sm_90")


def test_without_cuda_torch_computes_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    notices.say_once.cache_clear()
    caplog.set_level(logging.INFO, logger="app.models.kernels")
    x = edge_cases(torch.float32)
    assert_same(clamped_relu, x)
    clamped_relu(x)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "on cpu, torch computes it" in caplog.text


def test_a_kernel_that_does_not_compile_is_warned_of_once(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such architecture")

    monkeypatch.setattr(module, "load_kernels", fail)
    notices.say_once.cache_clear()
    module._compiled.cache_clear()
    assert [module._compiled(torch.device("cuda", 0)) for _ in range(2)] == [None, None]
    module._compiled.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no such architecture" in caplog.text


def test_torch_alone_passes_gradcheck() -> None:
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0, 5.5, 6.5, 9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(clamped_relu, x)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_the_kernel_equals_hardtanh_in_value_and_gradient(dtype: torch.dtype) -> None:
    x = edge_cases(dtype, device="cuda")
    assert module._kernels_for(x) is not None
    for view in (x, x[1:], x[3:4], x[:0], x[:1000].view(20, 50).T, x.repeat(5000)):
        assert_same(clamped_relu, view)


@needs_gpu
@pytest.mark.gpu
def test_on_a_gpu_the_kernel_passes_gradcheck() -> None:
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0, 5.5, 6.5, 9.0], device="cuda", requires_grad=True)
    assert module._kernels_for(x) is not None
    assert torch.autograd.gradcheck(clamped_relu, x, eps=1e-2, atol=1e-3)


@needs_gpu
@pytest.mark.gpu
def test_on_a_gpu_more_than_two_to_the_31_elements_are_computed() -> None:
    count = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = torch.full((count,), 9.0, dtype=torch.float16, device="cuda")
    y = clamped_relu(x)
    assert bool((y == 6).all())


@needs_gpu
@pytest.mark.gpu
def test_on_a_gpu_torch_compile_takes_the_activation_in() -> None:
    x = edge_cases(torch.float32, device="cuda")
    assert_same(torch.compile(clamped_relu, fullgraph=True), x)
