"""Attention kernels against each other: time and memory of forward and backward by length.

    python -m benchmarks.attention --json benchmarks/results/attention.json --plot docs/images/attention.png

GPT-2 small's heads (12 of 64), one row, causal and packed (documents of 128 tokens). On a GPU in bf16, else in fp32 on
the CPU. Each measurement runs in a process of its own; a kernel that cannot train here is reported with the reason.
`auto` is ours on a CPU, and what torch picks on a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from app.atomic import write_text
from app.errors import UserError
from app.models.attention import RowAttention, Rows, choose_backend
from app.training.trainer import peak_memory_bytes
from benchmarks.machine import describe

HEADS, HEAD_WIDTH = 12, 64
BACKENDS = ("auto", "math", "memory_efficient", "flash", "flex")
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
DOCUMENT = 128
REPEATS = 5
LONGEST_S = 300


def measure(backend: str, length: int, *, is_packed: bool, device: torch.device) -> dict[str, Any]:
    """Median seconds of forward and backward, and peak bytes beyond inputs and torch."""
    torch.set_num_threads(2)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        choose_backend(backend, Rows(HEADS, HEADS, HEAD_WIDTH, device, dtype, is_packed))  # type: ignore[arg-type]
    except UserError as error:
        return {"reason": str(error)}
    shape = (1, HEADS, length, HEAD_WIDTH)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    documents = (torch.arange(length, device=device) // DOCUMENT).unsqueeze(0) if is_packed else None
    _step(backend, documents, q, k, v) if device.type == "cuda" else _step(backend, None, *_short(q, k, v))
    before, times = _peak_bytes(device), []
    for _ in range(REPEATS):
        _synchronize(device)
        started = time.perf_counter()
        _step(backend, documents, q, k, v)
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return {"seconds": statistics.median(times), "peak_bytes": _peak_bytes(device) - before}


def _step(backend: str, documents: torch.Tensor | None, *qkv: torch.Tensor) -> None:
    """As a layer of a training step does it, with the mask that all layers share made for each."""
    RowAttention(documents, backend=backend).attend(0, *qkv).sum().backward()  # type: ignore[arg-type]


def _short(*qkv: torch.Tensor) -> list[torch.Tensor]:
    return [tensor[:, :, :64].detach().requires_grad_(True) for tensor in qkv]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("BACKEND", "LENGTH", "PACKED"), help="measure in this process")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.one:
        backend, length, packed = arguments.one
        print(json.dumps(measure(backend, int(length), is_packed=packed == "True", device=device)))
        return
    results = []
    for is_packed in (False, True):
        for backend in BACKENDS:
            for length in LENGTHS:
                figures = _in_own_process(backend, length, is_packed)
                results.append({"backend": backend, "length": length, "packed": is_packed, **figures})
                if "reason" in figures:
                    break
            print(json.dumps(results[-1]), flush=True)
    report = {"machine": describe("torch"), "device": _device_name(device), "results": results}
    if arguments.json:
        write_text(arguments.json, json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        plot(report, arguments.plot)


def _in_own_process(backend: str, length: int, is_packed: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.attention", "--one", backend, str(length), str(is_packed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S)
    if done.returncode:
        raise SystemExit(f"{backend} at {length} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def plot(report: dict[str, Any], file: Path) -> None:
    """Time and memory by length; packed rows dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    labels = (("seconds", "forward and backward, seconds"), ("peak_bytes", "peak memory, bytes"))
    for axes, (key, label) in zip(panels, labels, strict=True):
        for number, backend in enumerate(BACKENDS):
            for packed in (False, True):
                points = [
                    (row["length"], row[key])
                    for row in report["results"]
                    if row["backend"] == backend and row["packed"] == packed and row.get(key)
                ]
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        marker="o",
                        color=f"C{number}",
                        linestyle="--" if packed else "-",
                        label=f"{backend}{', packed' if packed else ''}",
                    )
        axes.set(xscale="log", yscale="log", xlabel="tokens in the row", ylabel=label)
        axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"Attention of GPT-2 small's shape, one layer, {report['device']}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
