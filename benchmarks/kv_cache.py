"""What a KV cache is worth: the same answers with one and without, in full precision, bf16 and int8, on GPT-2 124M.

    python -m benchmarks.kv_cache --json benchmarks/results/kv_cache.json --plot benchmarks/results/kv_cache.png

Without a cache each token is computed from all tokens before it; with one, from its own row. Both are the engine, with
the same products: without, it is asked for one token at a time, of a prompt that has the answer so far at its end. How
many rows go through the model is asserted at every step, and both must give the same tokens in fp32. They take a step
each by turns, as the machine's speed changes. Random weights: the time does not depend on them.
"""

import argparse
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from app.atomic import write_text
from app.engine.engine import Engine, EngineSettings
from app.engine.sampling import Sampling
from app.models.decoder import GPT2_SIZES, Decoder
from app.models.quantization import QuantizationConfig, quantize
from benchmarks.machine import describe, has_bf16

PROMPT, NEW = 32, 96
BATCHES = (1, 8)
Answers = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    report: dict[str, Any] = {"machine": describe("torch"), "prompt": PROMPT, "new": NEW, "runs": []}
    for precision in ("fp32", "bf16", "int8") if has_bf16() else ("fp32", "int8"):
        with_cache, without = engines(make_model(precision), precision, max_batch_size=max(BATCHES))
        for batch in BATCHES:
            draw = torch.Generator().manual_seed(batch)
            prompts = torch.randint(0, 50257, (batch, PROMPT), generator=draw).tolist()
            compare(with_cache, without, prompts, new=2)  # warms up
            gc.collect()
            gc.freeze()  # as a generator replica does
            step_s, answers = compare(with_cache, without, prompts, new=NEW)
            same = sum(a == b for a, b in zip(*answers.values(), strict=True))
            if precision == "fp32" and same < batch:
                raise SystemExit("with and without a cache the tokens differ")
            for name, seconds in step_s.items():
                run = {
                    "precision": precision,
                    "batch": batch,
                    "cache": name,
                    "step_s": [round(each, 5) for each in seconds],
                    "tokens_per_s": round(batch * NEW / sum(seconds), 1),
                    "same_answers": same,
                }
                report["runs"].append(run)
                print(f"{precision}, batch {batch}, {name}: {run['tokens_per_s']} tokens/s", flush=True)
            if arguments.json:
                write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot(report, arguments.plot)


def make_model(precision: str) -> Decoder:
    model = Decoder(GPT2_SIZES["gpt2"])
    model.initialize(generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False).eval()
    if precision == "int8":
        quantize(model, QuantizationConfig.model_validate({"scheme": "int8_dynamic"}))
    return model.bfloat16() if precision == "bf16" else model


def engines(model: Decoder, precision: str, *, max_batch_size: int) -> tuple[Engine, Engine]:
    """Two alike, one for each way; a step has room for all rows of the longest answers."""
    settings = EngineSettings(
        max_batch_size=max_batch_size,
        max_step_tokens=max_batch_size * (PROMPT + NEW),
        reuse_prefixes=False,
        prefault_kv=True,
        int8_head=precision == "int8",
        kv_dtype="int8" if precision == "int8" else "auto",
    )
    return Engine(model, settings), Engine(model, settings)


def compare(
    with_cache: Engine, without: Engine, prompts: Answers, *, new: int
) -> tuple[dict[str, list[float]], dict[str, Answers]]:
    """Seconds of each step, and the answers, of both ways."""
    step_s: dict[str, list[float]] = {"with cache": [], "without cache": []}
    answers: dict[str, Answers] = {name: [[] for _ in prompts] for name in step_s}
    length = len(prompts[0])
    _ask(with_cache, prompts, new)
    for number in range(new):
        _ask(without, [ids + answer for ids, answer in zip(prompts, answers["without cache"], strict=True)], 1)
        for name, engine, rows in (
            ("with cache", with_cache, length if number == 0 else 1),
            ("without cache", without, length + number),
        ):
            seconds, tokens = _step(engine, rows=len(prompts) * rows)
            step_s[name].append(seconds)
            for answer, token in zip(answers[name], tokens, strict=True):
                answer.append(token)
    assert not with_cache.has_work and not without.has_work
    return step_s, answers


def _ask(engine: Engine, prompts: Answers, new: int) -> None:
    for ids in prompts:
        engine.add_request(ids, Sampling(max_tokens=new))


def _step(engine: Engine, *, rows: int) -> tuple[float, list[int]]:
    """Its seconds, and the next token of each request, which must have taken so many rows."""
    before = engine.stats().computed_tokens
    started = time.perf_counter()
    events = engine.step()
    seconds = time.perf_counter() - started
    computed = engine.stats().computed_tokens - before
    assert computed == rows, f"a step computed {computed} rows, not {rows}"
    tokens = [event.token for event in sorted(events, key=lambda event: event.request_id)]
    return seconds, [token for token in tokens if token is not None]


def plot(report: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2 * len(BATCHES), figsize=(4.2 * 2 * len(BATCHES), 3.6))
    styles = {"with cache": "-", "without cache": "--"}
    colors = {"fp32": "#2a6f97", "bf16": "#5b8e3e", "int8": "#d1495b"}
    for place, batch in enumerate(BATCHES):
        latency, rate = axes[2 * place], axes[2 * place + 1]
        runs = [run for run in report["runs"] if run["batch"] == batch]
        for run in runs:
            name, line = f"{run['precision']} {run['cache'].split()[0]}", styles[run["cache"]]
            latency.plot([1000 * s for s in run["step_s"]], line, color=colors[run["precision"]], label=name)
        latency.set(title=f"batch {batch}", xlabel="token of the answer", ylabel="ms a step", yscale="log")
        latency.set_ylim(top=10 * latency.get_ylim()[1])  # room for the legend
        title = "with the cache, or without"
        latency.legend(fontsize=6, title=title, title_fontsize=6, ncols=len(runs) // 2, loc="upper center")
        names = [f"{run['precision']}\n{run['cache'].split()[0]}" for run in runs]
        bars = rate.bar(names, [run["tokens_per_s"] for run in runs], color=[colors[run["precision"]] for run in runs])
        rate.bar_label(bars, fmt="%.0f")
        rate.set(title=f"batch {batch}", ylabel="tokens/s", xlabel=title)
        rate.tick_params(axis="x", labelsize=7)
        for axis in (latency, rate):
            axis.spines[["top", "right"]].set_visible(False)
    machine = report["machine"]
    figure.suptitle(
        f"GPT-2 124M, prompts of {report['prompt']} and answers of {report['new']} tokens · "
        f"{machine['processor']}, {machine['cores']} cores",
        fontsize=9,
    )
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
