"""The engine under random arrivals, aborts and changing deltas for many minutes: memory flat, answers exact.

    python -m benchmarks.engine_soak --minutes 20 --json benchmarks/results/engine_soak.json

The embedded base, deltas of all techniques with random weights under a byte budget that does not hold them all. Every
answer that is not aborted is compared with what the same request got before anything else ran. Exits with 1 where one
differs, a block is missing at the end, or resident memory after the first quarter grew by more than 5 %.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from app.assets import model_folder
from app.atomic import write_text
from app.config import AdapterConfig, BitFitConfig, ExtraBlockConfig, LoraConfig, PrefixConfig, PromptConfig
from app.engine.deltas import DeltasFull, UnknownDelta
from app.engine.engine import Engine
from app.engine.events import QueueFull
from app.engine.sampling import Sampling
from app.methods import apply_method
from app.methods.delta import Delta
from app.models.checkpoints import load_decoder
from benchmarks.machine import describe

METHODS = [
    LoraConfig(rank=4),
    LoraConfig(rank=16),
    LoraConfig(rank=8, dora=True),
    AdapterConfig(size=16),
    PrefixConfig(length=20),
    PromptConfig(length=7),
    BitFitConfig(),
    ExtraBlockConfig(),
]
NUM_PROMPTS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = soak(arguments.minutes)
    print(json.dumps({key: value for key, value in report.items() if key != "samples"}, indent=2))
    if arguments.json:
        write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    sys.exit(0 if report["passed"] else 1)


def soak(minutes: float) -> dict[str, Any]:
    draw = random.Random(0)
    folder = model_folder("embedded")
    deltas = [None, *(_delta(folder, method, seed) for seed, method in enumerate(METHODS))]
    prompts = [[draw.randrange(8192) for _ in range(draw.randint(1, 200))] for _ in range(NUM_PROMPTS)]
    expected = _expected(folder, deltas, prompts)
    model = load_decoder(folder).requires_grad_(False)
    sizes = [Engine(model).prepare_delta(delta).num_bytes for delta in deltas if delta]
    budget = max(sizes) + (sum(sizes) - max(sizes)) // 2  # all but the largest take turns in a half of their bytes
    engine = Engine(model, max_batch_size=24, max_queue=40, max_kv_bytes=48 * 2**20, max_delta_bytes=budget)
    wanted: dict[int, tuple[list[int], list[int]]] = {}
    counts = dict.fromkeys(("finished", "wrong", "aborted", "refused", "loaded", "no room for a delta"), 0)
    samples: list[tuple[float, int]] = []
    started, next_sample = time.monotonic(), 0.0
    while (elapsed := time.monotonic() - started) < 60 * minutes:
        if elapsed >= next_sample:
            samples.append((round(elapsed, 1), psutil.Process().memory_info().rss))
            next_sample += max(1.0, 60 * minutes / 200)
        for _ in range(draw.choice((0, 0, 0, 1, 1, 6))):
            _arrive(engine, draw, deltas, prompts, expected, wanted, counts)
        if wanted and draw.random() < 0.02:
            request_id = draw.choice(list(wanted))
            counts["aborted"] += engine.abort(request_id)
            del wanted[request_id]
        for event in engine.step():
            answer, right = wanted[event.request_id]
            if event.token is not None:
                answer.append(event.token)
            if event.finish_reason:
                counts["finished"] += 1
                counts["wrong"] += answer != right
                del wanted[event.request_id]
    engine.abort_all()
    stats = engine.stats()
    settled = [size for at, size in samples if at > 15 * minutes]
    growth = settled[-1] / settled[0] - 1
    passed = not counts["wrong"] and stats.free_blocks == stats.blocks and growth < 0.05
    return {
        "machine": describe("torch"),
        "minutes": minutes,
        "passed": passed,
        "counts": counts,
        "stats": vars(stats),
        "memory_growth_after_the_first_quarter": round(growth, 4),
        "samples": samples,
    }


def _arrive(
    engine: Engine,
    draw: random.Random,
    deltas: list[Delta | None],
    prompts: list[list[int]],
    expected: dict[tuple[int, int], list[int]],
    wanted: dict[int, tuple[list[int], list[int]]],
    counts: dict[str, int],
) -> None:
    which, number, length = draw.randrange(len(deltas)), draw.randrange(len(prompts)), draw.randint(1, 40)
    delta = deltas[which]
    try:
        try:
            request_id = engine.add_request(prompts[number], Sampling(max_tokens=length), delta and delta.hash)
        except UnknownDelta:
            assert delta is not None
            engine.add_delta(delta)
            counts["loaded"] += 1
            request_id = engine.add_request(prompts[number], Sampling(max_tokens=length), delta.hash)
    except QueueFull:
        counts["refused"] += 1
    except DeltasFull:
        counts["no room for a delta"] += 1
    else:
        wanted[request_id] = ([], expected[which, number][:length])


def _delta(folder: Path, method: Any, seed: int) -> Delta:
    changed = load_decoder(folder)
    torch.manual_seed(seed)
    apply_method(changed, method)
    weights = {
        name: p.detach() + 0.1 * (p.std().item() or 0.3) * torch.randn(p.shape)
        for name, p in changed.named_parameters()
        if p.requires_grad
    }
    return Delta(method, weights, {"base_hash": str(seed)})


def _expected(folder: Path, deltas: list[Delta | None], prompts: list[list[int]]) -> dict[tuple[int, int], list[int]]:
    """The 40 tokens that each delta answers to each prompt, one request at a time."""
    engine = Engine(load_decoder(folder).requires_grad_(False), max_batch_size=1, max_queue=10, reuse_prefixes=False)
    answers = {}
    for which, delta in enumerate(deltas):
        key = delta and engine.add_delta(delta)
        for number, ids in enumerate(prompts):
            engine.add_request(ids, Sampling(max_tokens=40), key)
            answer = []
            while engine.has_work:
                answer += [event.token for event in engine.step() if event.token is not None]
            answers[which, number] = answer
    return answers


if __name__ == "__main__":
    main()
