"""Every fine-tuning technique on one base, one data set and one budget of steps, each in a process of its own.

    pacos prepare source=alpaca_data.json max_length=448 output=runs/alpaca-448
    python -m benchmarks.techniques --data runs/alpaca-448 --json benchmarks/results/techniques.json \
        --plot docs/images/techniques.png

The loop is `app/training/loop.py` in one plain process, in fp32. Each technique has its own learning rate: for most
the best of two to four that were tried for 40 steps, for the variants that of their kin.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.assets import model_folder
from app.atomic import write_text
from app.config import (
    AdapterConfig,
    BitFitConfig,
    ComposedConfig,
    ExtraBlockConfig,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    MethodConfig,
    OptimizerConfig,
    PrefixConfig,
    PromptConfig,
)
from app.data.batches import Batch, batches_by_length, collate
from app.data.shards import COLUMNS, read_manifest
from app.methods import apply_method, without_training_parts
from app.methods.delta import Delta, write_delta
from app.models.checkpoints import load_decoder
from app.training import loop
from app.training.optimizer import PlainOptimizer, trained_parameters
from app.training.trainer import peak_memory_bytes
from benchmarks.machine import describe

BATCH_SIZE = 8
THREADS = 2


@dataclass(frozen=True)
class Entry:
    method: MethodConfig
    learning_rate: float


ENTRIES = {
    "LoRA r=8, all layers": Entry(LoraConfig(rank=8, alpha=16), 2e-3),
    "LoRA r=8, attention input": Entry(LoraConfig(rank=8, alpha=16, targets=("attn.qkv",)), 5e-3),
    "rsLoRA r=32": Entry(LoraConfig(rank=32, alpha=16, rank_stabilized=True), 1e-3),
    "DoRA r=8": Entry(LoraConfig(rank=8, alpha=16, dora=True), 2e-3),
    "adapters of 64": Entry(AdapterConfig(size=64), 3e-3),
    "adapters of 64, MLP only": Entry(AdapterConfig(size=64, placement="mlp"), 3e-3),
    "prefix of 50": Entry(PrefixConfig(length=50), 3e-2),
    "prefix of 50 from an MLP": Entry(PrefixConfig(length=50, mlp_width=320), 3e-3),
    "prompt of 50": Entry(PromptConfig(length=50), 5e-2),
    "first 4 blocks frozen": Entry(FreezeConfig(frozen=("embeddings", "blocks.0-3")), 2e-4),
    "an extra block": Entry(ExtraBlockConfig(), 1e-3),
    "an extra block, LoRA r=8": Entry(ComposedConfig(parts=(ExtraBlockConfig(), LoraConfig(rank=8, alpha=16))), 1e-3),
    "BitFit": Entry(BitFitConfig(), 2e-3),
    "full": Entry(FullConfig(), 1e-4),
}


def measure(name: str, *, data: str, steps: int, max_eval_records: int, rate: float | None = None) -> dict[str, Any]:
    """Train one entry and return its figures; runs in a process of its own, whose peak memory is the entry's."""
    torch.set_num_threads(THREADS)
    entry = ENTRIES[name]
    model = load_decoder(model_folder("embedded"))
    torch.manual_seed(0)
    apply_method(model, entry.method)
    optimizer_config = OptimizerConfig(learning_rate=rate or entry.learning_rate)
    held_out = _held_out(data, max_eval_records)
    seen: list[loop.Metrics] = []
    loop.run(
        model,
        PlainOptimizer(model, optimizer_config),
        plan=loop.Plan(
            total_steps=steps,
            eval_every=steps,
            save_every=steps,
            optimizer=optimizer_config,
            precision="fp32",
            seed=0,
            is_packed=False,
        ),
        start_step=0,
        batches=_batches(data),
        validation=lambda: held_out,
        report=seen.append,
        save=lambda step, metrics: None,
    )
    peak = peak_memory_bytes()
    timed = [row for row in seen if "step_s" in row][1:]  # the first step warms caches up
    return {
        "name": name,
        "method": entry.method.model_dump(mode="json"),
        "learning_rate": optimizer_config.learning_rate,
        "trained": sum(parameter.numel() for parameter in trained_parameters(model).values()),
        "step_s": float(np.mean([row["step_s"] for row in timed])),
        "tokens_per_s": sum(row["tokens"] for row in timed) / sum(row["step_s"] for row in timed),
        "peak_bytes": peak,
        "perplexity_before": seen[0]["perplexity"],
        "loss": seen[-1]["eval_loss"],
        "perplexity": seen[-1]["perplexity"],
        "delta_bytes": _delta_bytes(model, entry.method),
    }


def _delta_bytes(model: Any, method: MethodConfig) -> int:
    method = without_training_parts(model, method)
    weights = {name: parameter.detach() for name, parameter in trained_parameters(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        write_delta(Path(folder), Delta(method, weights, {}))
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def _batches(data: str) -> Iterator[Batch]:
    """The same records in the same order for every entry."""
    table = read_manifest(data).read("train")
    columns = [table[name].to_numpy() for name in COLUMNS]
    for epoch in itertools.count():
        order = np.random.default_rng(epoch).permutation(table.num_rows)
        for first in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            yield collate(*(column[order[first : first + BATCH_SIZE]] for column in columns))


def _held_out(data: str, count: int) -> list[Batch]:
    table = read_manifest(data).read("validation")
    columns = (table[name].to_numpy()[:count] for name in COLUMNS)
    return list(batches_by_length(zip(*columns, strict=True), size=16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that `pacos prepare` wrote, with room for a prefix of 50")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-eval-records", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", choices=ENTRIES, help="measure one entry in this process and print it")
    parser.add_argument("--rate", type=float, help="another learning rate, with --only")
    arguments = parser.parse_args()
    settings = {"data": arguments.data, "steps": arguments.steps, "max_eval_records": arguments.max_eval_records}
    if arguments.only:
        print(json.dumps(measure(arguments.only, rate=arguments.rate, **settings)))
        return
    results = []
    for name in ENTRIES:
        started = time.perf_counter()
        results.append(_in_own_process(name, settings))
        print(
            f"{name:28} {time.perf_counter() - started:6.0f} s  perplexity {results[-1]['perplexity']:.2f}", flush=True
        )
    report = {
        "machine": describe("torch", "safetensors"),
        "steps": arguments.steps,
        "records_per_step": BATCH_SIZE,
        "threads": THREADS,
        "entries": results,
    }
    if arguments.json:
        write_text(arguments.json, json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        plot(report, arguments.plot)
    print(table(report))


def _in_own_process(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "benchmarks.techniques", "--only", name, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(report: dict[str, Any]) -> str:
    """The entries as a Markdown table."""
    lines = [
        "| technique | trained weights | learning rate | s/step | peak memory | held-out perplexity | delta |",
        "|---|---|---|---|---|---|---|",
        f"| the base, untuned | 0 | | | | {report['entries'][0]['perplexity_before']:.2f} | |",
    ]
    for entry in report["entries"]:
        lines.append(
            f"| {entry['name']} | {entry['trained']:,} | {entry['learning_rate']:g} | {entry['step_s']:.2f} | "
            f"{entry['peak_bytes'] / 2**30:.2f} GiB | {entry['perplexity']:.2f} | {entry['delta_bytes'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines)


def plot(report: dict[str, Any], file: Path) -> None:
    """Held-out perplexity and seconds per step against trained weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    for axes, key, label in ((left, "perplexity", "held-out perplexity"), (right, "step_s", "seconds per step")):
        for number, entry in enumerate(report["entries"], start=1):
            axes.scatter(entry["trained"], entry[key], color="tab:blue", zorder=2)
            axes.annotate(str(number), (entry["trained"], entry[key]), xytext=(4, 4), textcoords="offset points")
        axes.set(xscale="log", xlabel="trained weights", ylabel=label)
        axes.grid(alpha=0.3)
    left.axhline(report["entries"][0]["perplexity_before"], color="0.6", linestyle="--", linewidth=1)
    names = [f"{number}  {entry['name']}" for number, entry in enumerate(report["entries"], start=1)]
    figure.legend([pyplot.Line2D([], [], linestyle="")] * len(names), names, loc="outside right center", frameon=False,
                  handlelength=0)  # fmt: skip
    figure.suptitle(f"{report['steps']} steps of {report['records_per_step']} Alpaca records on the embedded base")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
