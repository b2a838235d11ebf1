"""What a KV cache is worth: the same answers with one and without, in full precision and in int8, on GPT-2 124M.

    python -m benchmarks.kv_cache --json benchmarks/results/kv_cache.json --plot benchmarks/results/kv_cache.png

Without a cache each token is computed from all tokens before it; with one, from its own row. That this is what happens
is asserted at every step by the number of rows that go through the model, and both must give the same tokens in fp32.
Random weights: the time does not depend on them.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from app.atomic import write_text
from app.engine.engine import Engine
from app.engine.sampling import Sampling
from app.models.decoder import GPT2_SIZES, Decoder
from app.models.quantization import QuantizationConfig, quantize
from benchmarks.machine import describe

PROMPT, NEW = 32, 96
BATCHES = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    report: dict[str, Any] = {"machine": describe("torch"), "prompt": PROMPT, "new": NEW, "runs": []}
    for precision in ("fp32", "int8"):
        model = make_model(precision)
        for batch in BATCHES:
            prompts = torch.randint(0, 50257, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
            kept, with_tokens = with_cache(model, prompts)
            computed, without_tokens = without_cache(model, prompts)
            if precision == "fp32" and with_tokens != without_tokens:
                raise SystemExit("with and without a cache the tokens differ")
            for name, step_s in (("with cache", kept), ("without cache", computed)):
                report["runs"].append(
                    {
                        "precision": precision,
                        "batch": batch,
                        "cache": name,
                        "step_s": [round(seconds, 5) for seconds in step_s],
                        "tokens_per_s": round(batch * NEW / sum(step_s), 1),
                    }
                )
                print(f"{precision}, batch {batch}, {name}: {report['runs'][-1]['tokens_per_s']} tokens/s", flush=True)
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
    return model


def with_cache(model: Decoder, prompts: torch.Tensor) -> tuple[list[float], list[list[int]]]:
    """Seconds of each step, and the answers."""
    engine = Engine(model, max_batch_size=len(prompts))
    _warm_up(engine)
    requests = [engine.add_request(ids, Sampling(max_tokens=NEW)) for ids in prompts.tolist()]
    answers: dict[int, list[int]] = {request: [] for request in requests}
    step_s = []
    for number in range(NEW):
        before = engine.stats().computed_tokens
        started = time.perf_counter()
        events = engine.step()
        step_s.append(time.perf_counter() - started)
        rows = engine.stats().computed_tokens - before
        assert rows == len(prompts) * (PROMPT if number == 0 else 1), f"step {number} computed {rows} rows"
        for event in events:
            assert event.token is not None
            answers[event.request_id].append(event.token)
    assert not engine.has_work
    return step_s, list(answers.values())


@torch.inference_mode()
def without_cache(model: Decoder, prompts: torch.Tensor) -> tuple[list[float], list[list[int]]]:
    ids = prompts
    rows: list[int] = []
    watch = model.blocks[0].register_forward_hook(lambda _, inputs, output: rows.append(output.shape[:2].numel()))
    model(ids)
    step_s = []
    for number in range(NEW):
        started = time.perf_counter()
        hidden = model(ids)
        ids = torch.cat([ids, model.head(hidden[:, -1]).argmax(dim=-1, keepdim=True)], dim=1)
        step_s.append(time.perf_counter() - started)
        assert rows[-1] == len(prompts) * (PROMPT + number), f"step {number} computed {rows[-1]} rows"
    watch.remove()
    return step_s, ids[:, PROMPT:].tolist()


def _warm_up(engine: Engine) -> None:
    engine.add_request([1, 2, 3], Sampling(max_tokens=3))
    while engine.has_work:
        engine.step()


def plot(report: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2 * len(BATCHES), figsize=(4.2 * 2 * len(BATCHES), 3.6))
    styles = {"with cache": "-", "without cache": "--"}
    colors = {"fp32": "#2a6f97", "int8": "#d1495b"}
    for place, batch in enumerate(BATCHES):
        latency, rate = axes[2 * place], axes[2 * place + 1]
        runs = [run for run in report["runs"] if run["batch"] == batch]
        for run in runs:
            name, line = f"{run['precision']}, {run['cache']}", styles[run["cache"]]
            latency.plot([1000 * s for s in run["step_s"]], line, color=colors[run["precision"]], label=name)
        latency.set(title=f"batch {batch}", xlabel="token of the answer", ylabel="ms a step", yscale="log")
        latency.legend(fontsize=7)
        names = [f"{run['precision']}\n{run['cache']}" for run in runs]
        bars = rate.bar(names, [run["tokens_per_s"] for run in runs], color=[colors[run["precision"]] for run in runs])
        rate.bar_label(bars, fmt="%.0f")
        rate.set(title=f"batch {batch}", ylabel="tokens/s")
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
