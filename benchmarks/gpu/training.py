"""How fast GPT-2 124M trains on one GPU: all weights at 1,024 tokens, and LoRA; tokens/s and MFU.

    python -m benchmarks.gpu.training --json benchmarks/results/gpu-training.json

`app/training/loop.py` in a plain process, in bf16: no Ray, no DeepSpeed, no `transformers`, no tokenizer; the token ids
are random, rows are full, and every token is in the loss. MFU is what `benchmarks/training/flops.py` says must be
computed, over the best bf16 matrix product measured on the same device. `--device cpu --tiny` tries the code on a CPU.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from app.atomic import write_text
from app.config import FullConfig, LoraConfig, MethodConfig, OptimizerConfig
from app.data.batches import Batch
from app.methods import apply_method
from app.models.decoder import GPT2_SIZES, Decoder, DecoderConfig
from app.training import loop
from app.training.optimizer import PlainOptimizer, trained_parameters
from app.training.precision import store_frozen
from benchmarks.machine import describe
from benchmarks.training.flops import best_product, full_step_flops, lora_step_flops

SEED, RANK = 0, 8
WARM_UP = 3
GPT2 = GPT2_SIZES["gpt2"]
TINY = replace(GPT2, vocab_size=512, context_length=64, num_layers=2, num_heads=2, width=32, mlp_width=128)
METHODS: dict[str, MethodConfig] = {"full": FullConfig(), "lora": LoraConfig(rank=RANK, alpha=16)}
LEARNING_RATES = {"full": 1e-4, "lora": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks; steps to warm up pay it")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers and short rows, to try the code")
    parser.add_argument("--rows", type=int, help="of a step; 16 by default, tiny 2")
    parser.add_argument("--micro-batches", type=int, default=1, help="into how many a step's rows are split")
    parser.add_argument("--attention", default="auto", help="the kernel that computes attention")
    parser.add_argument("--steps", type=int, default=20, help=f"measured, after {WARM_UP} that warm up")
    parser.add_argument("--profile", type=Path, help="file for a table of where the GPU's time goes; it slows the run")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA device; --device cpu --tiny tries the code without one")
        return
    device = torch.device(arguments.device)
    shape = TINY if arguments.tiny else GPT2
    peak = best_product(torch.bfloat16, device=device)
    report: dict[str, Any] = {
        "machine": describe("torch"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "peak": peak,
        "steps": arguments.steps,
        "imported": sorted({"ray", "deepspeed", "transformers"} & sys.modules.keys()),
        "results": {},
    }
    for name in METHODS:
        figures = measure(name, shape, device=device, arguments=arguments)
        figures["mfu"] = figures["flops_per_s"] / peak["flops_per_s"]
        report["results"][name] = figures
        print(
            f"{name}: {figures['tokens_per_s']:,.0f} tokens/s, MFU {100 * figures['mfu']:.1f} % of "
            f"{peak['flops_per_s'] / 1e12:.3g} TFLOP/s, {figures['peak_bytes'] / 2**30:.2f} GiB",
            flush=True,
        )
        if arguments.json:
            write_text(arguments.json, json.dumps(report, indent=2) + "\n")


def measure(name: str, shape: DecoderConfig, *, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a fresh model by technique `name` on random tokens, and say how fast that went."""
    rows = arguments.rows or (2 if arguments.tiny else 16)
    time = shape.context_length
    model = _model(name, shape, device=device, attention=arguments.attention)
    if arguments.compile:
        model.compile_blocks()
    optimizer = OptimizerConfig(learning_rate=LEARNING_RATES[name], schedule="constant", warmup_fraction=0.0)
    total_steps = WARM_UP + arguments.steps
    seen: list[loop.Metrics] = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with _profiled(name, arguments.profile):
        loop.run(
            model,
            PlainOptimizer(model, optimizer),
            plan=loop.Plan(
                total_steps=total_steps,
                eval_every=total_steps,
                save_every=total_steps,
                optimizer=optimizer,
                precision="bf16",
                seed=SEED,
                is_packed=False,
                micro_batches=arguments.micro_batches,
            ),
            start_step=0,
            batches=_batches(rows, time, vocab_size=shape.vocab_size, device=device),
            validation=list,
            report=seen.append,
            save=lambda step, metrics: None,
        )
    steps = [row for row in seen if "step_s" in row][WARM_UP:]
    step_s = statistics.median(row["step_s"] for row in steps)
    answers = rows * (time - 1)
    flops = (
        full_step_flops(shape, [time] * rows, answers=answers)
        if name == "full"
        else lora_step_flops(shape, [time] * rows, answers=answers, rank=RANK)
    )
    return {
        "method": METHODS[name].model_dump(mode="json"),
        "trained": sum(parameter.numel() for parameter in trained_parameters(model).values()),
        "rows": rows,
        "tokens_in_a_row": time,
        "kernels": seen[0]["kernels"],
        "step_s": step_s,
        "tokens_per_s": rows * time / step_s,
        "flops_per_s": flops / step_s,
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
        "peak_bytes": _peak_bytes(device),
    }


@contextmanager
def _profiled(name: str, file: Path | None) -> Iterator[None]:
    """Append to `file`, where there is one, the kernels that take most of the GPU's time."""
    if file is None:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    with file.open("a") as out:
        out.write(f"{name}\n{profile.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=80)}\n")


def _model(name: str, shape: DecoderConfig, *, device: torch.device, attention: str) -> Decoder:
    model = Decoder(shape)
    model.initialize(generator=torch.Generator().manual_seed(SEED))
    torch.manual_seed(SEED)
    apply_method(model, METHODS[name])
    model.attention = attention  # type: ignore[assignment]
    model.to(device)
    store_frozen(model, "bf16", device)
    return model


def _batches(rows: int, time: int, *, vocab_size: int, device: torch.device) -> Iterator[Batch]:
    """Eight batches over and over, on the device already: what is measured is training, not data."""
    generator = torch.Generator().manual_seed(SEED)
    mask = torch.ones(rows, time, dtype=torch.bool)
    batches = [
        Batch(torch.randint(vocab_size, (rows, time), generator=generator), mask, rows * time).to(device)
        for _ in range(8)
    ]
    return itertools.cycle(batches)


def _peak_bytes(device: torch.device) -> int:
    from app.training.trainer import peak_memory_bytes

    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory_bytes()


if __name__ == "__main__":
    main()
