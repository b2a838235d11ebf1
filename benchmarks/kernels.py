"""Our kernels beside the torch code that defines them: time and memory of forward and backward pass together.

    python -m benchmarks.kernels --json benchmarks/results/kernels.json

On a GPU where there is one, in bf16; else on the CPU, in fp32. Every measurement is a process of its own, and they
come in turn, so that a slow moment of the machine hits all alike; medians count. Memory is the peak beyond what was
held before, with the gradients that are returned: resident memory on a CPU, torch's allocations on a GPU. On a CPU,
processor time stands beside the time of the clock, which other programs disturb.

On a CPU the clamped ReLU is torch's hardtanh itself, so that there is nothing to compare: its ratios are noise.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.kernels.clamped_relu import LIMIT, clamped_relu
from app.models.kernels.cross_entropy import fused_cross_entropy, reference_cross_entropy
from benchmarks.machine import describe

ACTIVATION_SHAPE = (8192, 3072)  # eight rows of 1,024 tokens through GPT-2's MLP
HEADS = {"embedded": (2000, 8192, 320), "gpt2": (2000, 50257, 768)}
"""Rows, vocabulary and width: of the embedded base model, and of GPT-2."""

Step = Callable[[int], None]
"""A forward and a backward pass over the first so many rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="processes for each; the median counts")
    parser.add_argument("--json", required=True, help="file to write the result to")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(measure(*PARTS[arguments.part]())))
        return
    runs: dict[str, list[dict[str, float]]] = {part: [] for part in PARTS}
    for number in range(arguments.repeat):
        for part in PARTS:
            runs[part].append(run_part(part))
            print(f"{number + 1}/{arguments.repeat} {part}: {runs[part][-1]}", flush=True)
    result = {
        "machine": describe("torch", "triton"),
        "device": device(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "dtype": str(dtype()).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "clamped_relu": "our kernel" if torch.cuda.is_available() else "torch's hardtanh itself; the ratios are noise",
        "ratios": ratios(runs),
        "runs": runs,
    }
    Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))


def run_part(part: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.kernels", "--part", part, "--json", "-"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each comparison, medians of ours over medians of the reference's: below 1 is better."""
    medians = {
        part: {key: statistics.median(run[key] for run in of_part) for key in of_part[0]}
        for part, of_part in runs.items()
    }
    return {
        case: {
            key: round(ours / max(medians[f"{case} reference"][key], 1e-9), 3) for key, ours in medians[part].items()
        }
        for part in PARTS
        if (case := part.removesuffix(" ours")) != part
    }


# --- in the process of a part ---


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def measure(step: Step, num_rows: int) -> dict[str, float]:
    step(64)  # libraries load, kernels compile
    if torch.cuda.is_available():
        return measure_on_gpu(partial(step, num_rows))
    before = reset_peak()
    started, started_cpu = time.perf_counter(), time.process_time()
    step(num_rows)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    peak_mib = (status_bytes("VmHWM") - before) / 2**20
    return {"seconds": round(seconds, 4), "cpu_s": round(cpu_s, 4), "peak_mib": round(peak_mib, 1)}


def measure_on_gpu(step: Callable[[], None]) -> dict[str, float]:
    times = []
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    peak = torch.cuda.max_memory_allocated() - before
    return {"seconds": round(statistics.median(times), 7), "peak_mib": round(peak / 2**20, 1)}


def reset_peak() -> int:
    """Resident bytes now, from which on Linux counts the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def activation(function: Callable[[Tensor], Tensor]) -> tuple[Step, int]:
    x = torch.randn(ACTIVATION_SHAPE, device=device(), dtype=dtype(), requires_grad=True)
    gradient = torch.randn_like(x)

    def step(num_rows: int) -> None:
        torch.autograd.grad(function(x[:num_rows]), x, gradient[:num_rows])

    return step, ACTIVATION_SHAPE[0]


def head(function: Callable[..., Tensor], shape: tuple[int, int, int], trains_weight: bool) -> tuple[Step, int]:
    num_rows, vocab_size, width = shape
    rows = torch.randn(num_rows, width, device=device(), dtype=dtype(), requires_grad=True)
    weight = (0.02 * torch.randn(vocab_size, width, device=device())).to(dtype()).requires_grad_(trains_weight)
    labels = torch.randint(0, vocab_size, (num_rows,), device=device())
    inputs = [rows, weight] if trains_weight else [rows]

    def step(count: int) -> None:
        torch.autograd.grad(function(rows[:count], weight, labels[:count]) / count, inputs)

    return step, num_rows


PARTS: dict[str, Callable[[], tuple[Step, int]]] = {
    "clamped_relu reference": partial(activation, partial(F.hardtanh, min_val=0.0, max_val=LIMIT)),
    "clamped_relu ours": partial(activation, clamped_relu),
    **{
        f"cross_entropy {name} {kind} {version}": partial(head, function, shape, trains_weight)
        for name, shape in HEADS.items()
        for kind, trains_weight in (("frozen head", False), ("trained head", True))
        for version, function in (("reference", reference_cross_entropy), ("ours", fused_cross_entropy))
    },
}

if __name__ == "__main__":
    main()
