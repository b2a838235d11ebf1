"""Sizes, depths and vocabularies of the embedded base: each from scratch, with the same compute, on the same text.

    python -m benchmarks.pretraining alpaca_data.json dolly_15k.jsonl --flops 1e12 --rows 8 \
        --json benchmarks/results/pretraining.json --plot docs/images/base-shapes.png

Compute is counted in floating-point operations, not in seconds, so that what else the machine does makes no
difference: a smaller model sees more text. Compared by bits per byte, since perplexities of different vocabularies
cannot be. Loop, data and optimizer are those of `pacos pretrain`, in one plain process, in the machine's own
format.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from app.atomic import write_text
from app.config import PretrainConfig
from app.training import loop
from app.training.muon import MuonOptimizer
from app.training.pretraining import Corpus, load_corpus, new_model, plan, training_batches, validation_batches
from benchmarks.machine import describe

MOST_BYTES = 24_000_000
"""Of weights in bf16: what the repository has room for."""
BATCH_SIZE = 8
NUM_EVALUATIONS = 4

CANDIDATES: dict[str, dict[str, int]] = {
    "6 x 320, 8k": {},
    "6 x 352, 4k": {"num_heads": 11, "width": 352, "vocab_size": 4096},
    "6 x 288, 16k": {"num_heads": 6, "width": 288, "vocab_size": 16384},
    "4 x 384, 8k": {"num_layers": 4, "num_heads": 6, "width": 384},
    "10 x 256, 8k": {"num_layers": 10, "num_heads": 4, "width": 256},
    "6 x 192, 8k": {"num_heads": 3, "width": 192},
}
"""Layers x width and vocabulary: settings that differ from those of configs/pretrain-base.yaml."""


def measure(
    settings: dict[str, int], corpus: Corpus, *, config: PretrainConfig, flops: float, rows: int
) -> dict[str, Any]:
    """Train one candidate for `flops`, held out on `rows` rows; its figures and its curve."""
    model = new_model(config, vocab_size=corpus.tokenizer.vocab_size)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * weights <= MOST_BYTES, f"{settings} has {weights} weights"
    step_flops = flops_per_token(config) * config.batch_size * config.context_length
    steps = max(1, round(flops / step_flops))
    config = config.model_copy(update={"steps": steps, "eval_every": max(1, steps // NUM_EVALUATIONS)})
    held_out = list(islice(validation_batches(corpus, config), max(1, rows // config.batch_size)))
    seen: list[loop.Metrics] = []
    started = time.process_time()
    loop.run(
        model,
        MuonOptimizer(model, config.optimizer),
        plan=plan(config),
        start_step=0,
        batches=training_batches(corpus, config, start_step=0),
        validation=lambda: held_out,
        report=seen.append,
        save=lambda step, metrics: None,
    )
    to_bits = 1 / math.log(2) / corpus.validation_bytes_per_token
    curve = [(row["step"] * step_flops, row["eval_loss"] * to_bits) for row in seen if "eval_loss" in row]
    return {
        "settings": settings,
        "weights": weights,
        "steps": steps,
        "tokens": steps * config.batch_size * config.context_length,
        "bytes_per_token": corpus.validation_bytes_per_token,
        "cpu_s": time.process_time() - started,
        "bits_per_byte": curve[-1][1],
        "curve": curve,
    }


def flops_per_token(config: PretrainConfig) -> float:
    """Of a training step: forward once, backward twice. Causal attention sees half of the context on average."""
    blocks = config.num_layers * 12 * config.width**2
    attention = config.num_layers * config.context_length * config.width
    return 6 * (blocks + config.vocab_size * config.width + attention)


def base_config(sources: Sequence[str], settings: dict[str, int]) -> PretrainConfig:
    """As configs/pretrain-base.yaml, but for `settings`."""
    return PretrainConfig.model_validate(
        {
            "sources": list(sources),
            "output": "unused",
            "batch_size": BATCH_SIZE,
            "optimizer": {"learning_rate": 3e-3, "schedule": "trapezoid", "decay_fraction": 0.3, "final_fraction": 0.0},
            "precision": "auto",
            **settings,
        }
    )


def run(sources: Sequence[str], *, flops: float, rows: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure every candidate; `keep` gets the report so far after each."""
    corpora: dict[int, Corpus] = {}
    report: dict[str, Any] = {
        "machine": describe("torch"),
        "threads": torch.get_num_threads(),
        "flops": flops,
        "held_out_rows": rows,
        "candidates": {},
    }
    for name, settings in CANDIDATES.items():
        config = base_config(sources, settings)
        corpus = corpora.setdefault(config.vocab_size, load_corpus(config))
        figures = measure(settings, corpus, config=config, flops=flops, rows=rows)
        report["candidates"][name] = figures
        print(f"{name:16} {figures['cpu_s']:5.0f} CPU s  {figures['bits_per_byte']:.3f} bits per byte", flush=True)
        keep(report)


def table(report: dict[str, Any]) -> str:
    """The candidates as a Markdown table, the best first."""
    lines = ["| layers x width, vocabulary | weights | tokens seen | bits per byte |", "|---|---|---|---|"]
    for name, entry in sorted(report["candidates"].items(), key=lambda item: item[1]["bits_per_byte"]):
        lines.append(f"| {name} | {entry['weights']:,} | {entry['tokens']:,} | {entry['bits_per_byte']:.3f} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], file: Path) -> None:
    """Held-out bits per byte against compute."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, entry in report["candidates"].items():
        flops, bits = zip(*entry["curve"][1:], strict=True)
        axes.plot([value / 1e12 for value in flops], bits, marker="o", markersize=3, label=name)
    axes.set(xlabel="training compute, 10^12 floating-point operations", ylabel="held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(title="layers x width, vocabulary", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="files to learn from")
    parser.add_argument("--flops", type=float, default=1e12, help="compute for each candidate")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows of a whole context")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="report; read, not measured, where no sources are given")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if not arguments.sources and not (arguments.json and arguments.json.exists()):
        parser.error("name the sources, or a report that is there with --json")
    torch.set_num_threads(arguments.threads)
    reports: list[dict[str, Any]] = []

    def keep(report: dict[str, Any]) -> None:
        reports.append(report)
        if arguments.json:
            write_text(arguments.json, json.dumps(report, indent=2) + "\n")

    if arguments.sources:
        run(arguments.sources, flops=arguments.flops, rows=arguments.rows, keep=keep)
    report = reports[-1] if reports else json.loads(arguments.json.read_text())
    if arguments.plot:
        plot(report, arguments.plot)
    print(table(report))


if __name__ == "__main__":
    main()
