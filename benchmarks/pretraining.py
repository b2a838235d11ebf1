"""Sizes, depths, vocabularies and weight decays of the embedded base, each from scratch on as many passes over a text.

    python -m benchmarks.pretraining alpaca_data.json dolly_15k.jsonl --passes 8 --device cuda --jobs 8 \
        --json benchmarks/results/pretraining.json --plot docs/images/base-shapes.png

There is more compute than text for a model this small, so that what is equal is how often each reads the text; each
has its whole schedule. Compared by bits per byte, since perplexities of different vocabularies cannot be. Loop, data
and optimizer are those of `pacos pretrain`, in one plain process for each. `--only NAME --keep FOLDER` writes that
candidate's model, of its last step.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from app.atomic import write_text
from app.config import PretrainConfig
from app.training import loop
from app.training.muon import MuonOptimizer
from app.training.pretraining import load_corpus, new_model, plan, training_batches, validation_batches, write_model
from benchmarks.machine import describe

MOST_BYTES = 24_000_000
"""Of weights in bf16: what the repository has room for."""
NUM_EVALUATIONS = 8

CANDIDATES: dict[str, dict[str, Any]] = {
    "6 x 288, 16k": {"num_heads": 6, "width": 288, "vocab_size": 16384},
    "6 x 320, 8k": {},
    "6 x 352, 4k": {"num_heads": 11, "width": 352, "vocab_size": 4096},
    "4 x 384, 8k": {"num_layers": 4, "num_heads": 6, "width": 384},
    "10 x 256, 8k": {"num_layers": 10, "num_heads": 4, "width": 256},
    "6 x 192, 8k": {"num_heads": 3, "width": 192},
    "6 x 320, 8k, decay 0.1": {"weight_decay": 0.1},
    "6 x 320, 8k, decay 2": {"weight_decay": 2.0},
}
"""Layers x width, vocabulary, weight decay: what differs from `base_config`."""


@dataclass(frozen=True)
class Trials:
    """What is the same for all candidates."""

    sources: Sequence[str]
    passes: float
    """Over the training text."""
    rows: int
    """Held-out rows that the curve is measured on; the end, on all."""
    batch_size: int
    device: str
    threads: int
    keep: Path | None = None


def measure(name: str, trials: Trials) -> dict[str, Any]:
    """Train one candidate; its figures and its curve."""
    torch.set_num_threads(trials.threads)
    device = torch.device(trials.device)
    config = base_config(trials, CANDIDATES[name])
    corpus = load_corpus(config)
    model = new_model(config, vocab_size=corpus.tokenizer.vocab_size).to(device)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * weights <= MOST_BYTES, f"{name} has {weights} weights"
    step_tokens = config.batch_size * config.context_length
    steps = max(1, round(trials.passes * corpus.train.num_tokens / step_tokens))
    config = config.model_copy(update={"steps": steps, "eval_every": max(1, steps // NUM_EVALUATIONS)})
    every = list(validation_batches(corpus, config))
    few = list(islice(every, max(1, trials.rows // config.batch_size)))
    seen: list[loop.Metrics] = []
    started, cpu_started = time.monotonic(), time.process_time()
    loop.run(
        model,
        MuonOptimizer(model, config.optimizer),
        plan=plan(config),
        start_step=0,
        batches=training_batches(corpus, config, start_step=0),
        validation=lambda: few,
        report=seen.append,
        save=lambda step, metrics: None,
    )
    wall_s, cpu_s = time.monotonic() - started, time.process_time() - cpu_started
    last = {"step": steps, **loop.evaluate(model, every, precision=config.precision)}
    if trials.keep:
        write_model(trials.keep, model, corpus, last)
    to_bits = 1 / math.log(2) / corpus.validation_bytes_per_token
    return {
        "settings": CANDIDATES[name],
        "weights": weights,
        "steps": steps,
        "tokens": steps * step_tokens,
        "bytes_per_token": corpus.validation_bytes_per_token,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "bits_per_byte": last["eval_loss"] * to_bits,
        "train_bits_per_byte": sum(row["loss"] for row in seen[1:][-50:]) / len(seen[1:][-50:]) * to_bits,
        "curve": [
            (row["step"] * step_tokens / corpus.train.num_tokens, row["eval_loss"] * to_bits)
            for row in seen
            if "eval_loss" in row
        ],
    }


def base_config(trials: Trials, settings: dict[str, Any]) -> PretrainConfig:
    """The schedule of configs/pretrain-base.yaml and the default shape, but for `settings`."""
    settings = {"weight_decay": 0.8, **settings}
    return PretrainConfig.model_validate(
        {
            "sources": list(trials.sources),
            "output": "unused",
            "batch_size": trials.batch_size,
            "optimizer": {
                "learning_rate": 3e-3,
                "schedule": "linear",
                "final_fraction": 0.0,
                "warmup_fraction": 0.02,
                "weight_decay": settings.pop("weight_decay"),
            },
            "precision": "auto",
            **settings,
        }
    )


def run(names: Sequence[str], trials: Trials, *, jobs: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure the candidates, `jobs` at once; `keep` gets the report so far after each."""
    report: dict[str, Any] = {
        "machine": describe("torch"),
        "device": torch.cuda.get_device_name() if trials.device == "cuda" else "CPU",
        "at_once": jobs,
        "threads": trials.threads,
        "passes": trials.passes,
        "rows_a_step": trials.batch_size,
        "candidates": {},
    }
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
        running = {processes.submit(measure, name, trials): name for name in names}
        for done in as_completed(running):
            name, figures = running[done], done.result()
            report["candidates"][name] = figures
            print(f"{name:24} {figures['wall_s']:5.0f} s  {figures['bits_per_byte']:.3f} bits per byte", flush=True)
            keep(report)


def table(report: dict[str, Any]) -> str:
    """The candidates as a Markdown table, the best first."""
    lines = [
        "| layers x width, vocabulary | weights | tokens seen | bits per byte, held out | in training |",
        "|---|---|---|---|---|",
    ]
    for name, entry in sorted(report["candidates"].items(), key=lambda item: item[1]["bits_per_byte"]):
        lines.append(
            f"| {name} | {entry['weights']:,} | {entry['tokens']:,} | {entry['bits_per_byte']:.3f} "
            f"| {entry['train_bits_per_byte']:.3f} |"
        )
    return "\n".join(lines)


def plot(report: dict[str, Any], file: Path) -> None:
    """Held-out bits per byte against passes over the text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, entry in report["candidates"].items():
        passes, bits = zip(*entry["curve"][1:], strict=True)
        axes.plot(passes, bits, marker="o", markersize=3, label=name)
    axes.set(xlabel="passes over the training text", ylabel="held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(title="layers x width, vocabulary", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="files to learn from")
    parser.add_argument("--passes", type=float, default=8, help="over the training text, for each candidate")
    parser.add_argument("--rows", type=int, default=128, help="held-out rows of a whole context for the curve")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a step")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="candidates at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the model of the one candidate that --only names")
    parser.add_argument("--json", type=Path, help="report; read, not measured, where no sources are given")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if not arguments.sources and not (arguments.json and arguments.json.exists()):
        parser.error("name the sources, or a report that is there with --json")
    if arguments.keep and len(arguments.only) > 1:
        parser.error("--keep takes one model: name its candidate with --only")
    reports: list[dict[str, Any]] = []

    def keep(report: dict[str, Any]) -> None:
        reports.append(report)
        if arguments.json:
            write_text(arguments.json, json.dumps(report, indent=2) + "\n")

    if arguments.sources:
        trials = Trials(
            sources=arguments.sources,
            passes=arguments.passes,
            rows=arguments.rows,
            batch_size=arguments.batch_size,
            device=arguments.device,
            threads=arguments.threads,
            keep=arguments.keep,
        )
        run(arguments.only, trials, jobs=arguments.jobs, keep=keep)
    report = reports[-1] if reports else json.loads(arguments.json.read_text())
    if arguments.plot:
        plot(report, arguments.plot)
    print(table(report))


if __name__ == "__main__":
    main()
