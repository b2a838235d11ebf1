"""How fast GPT-2 124M generates on one GPU, beside the memory's bandwidth and `transformers`.

    python -m benchmarks.gpu.generation --json benchmarks/results/gpu-generation.json

Random weights and random prompts, greedy, end tokens ignored: decoding at batch 1 and 256 (64 prompt tokens, 128 new),
and W2 of `benchmarks/generation/workloads.py`. Each contender is a process of its own, which is ended after
`--seconds-each`; what went wrong there is in the result in its place. A step's fraction of the limit is the time in
which the weights and the keys and values that it reads could be read once, at the bandwidth that a copy on the device
reaches (bytes read and written), over its time. `--size gpt2-xl` measures the shape of another of GPT-2's sizes.
`--device cpu --tiny` tries the code on a CPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.atomic import write_text
from app.engine.engine import Engine, EngineSettings
from app.engine.sampling import Sampling
from app.models.decoder import GPT2_SIZES, Decoder, DecoderConfig
from app.models.quantization import QuantizationConfig, quantize
from benchmarks.generation.workloads import workload
from benchmarks.machine import describe

SEED, PROMPT, NEW = 0, 64, 128
TINY = replace(GPT2_SIZES["gpt2"], num_layers=2, num_heads=2, width=32, mlp_width=128, context_length=256)
Requests = list[tuple[list[int], int]]
"""Prompt ids and how many new tokens."""
Batches = tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers and batches of 1 and 4")
    parser.add_argument("--size", choices=GPT2_SIZES, default="gpt2")
    parser.add_argument("--seconds-each", type=float, default=60, help="after which a contender is ended")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--json", type=Path, help="file to write the result to, after each contender")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA device; --device cpu --tiny tries the code without one")
        return
    device = torch.device(arguments.device)
    if arguments.contender:
        batches = (1, 4) if arguments.tiny else (1, 256)
        CONTENDERS[arguments.contender](device, TINY if arguments.tiny else GPT2_SIZES[arguments.size], batches)
        return
    report: dict[str, Any] = {
        "machine": describe("torch", "transformers", "numpy"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "model": arguments.size,
        "bandwidth": bandwidth(device),
        "results": {},
    }
    print(f"{report['device']}: {report['bandwidth'] / 1e12:.3g} TB/s", flush=True)
    for name in arguments.only:
        report["results"][name] = figures = _run(name, arguments)
        for part, row in figures.items():
            if isinstance(row, dict) and "bytes" in row:
                limit = row["bytes"] / report["bandwidth"]
                row["of_limit"] = limit / row["step_s"]
                if "replay_s" in row:
                    row["replay_of_limit"] = limit / row["replay_s"]
            print(f"{name} {part}: {_line(row)}", flush=True)
        if arguments.json:
            write_text(arguments.json, json.dumps(report, indent=2) + "\n")


def _run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the contender's process printed, and how it ended if not well."""
    command = [sys.executable, "-m", "benchmarks.gpu.generation", "--contender", name, "--device", arguments.device]
    command += ["--size", arguments.size]
    started = time.perf_counter()
    error = None
    try:
        run = subprocess.run(
            [*command, *(["--tiny"] if arguments.tiny else [])],
            capture_output=True, text=True, timeout=arguments.seconds_each,
        )  # fmt: skip
        output = run.stdout
        if run.returncode:
            error = f"exit {run.returncode}: {run.stderr[-1500:]}"
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode()
        error = f"ended after {arguments.seconds_each:g} s: {(expired.stderr or b'').decode()[-500:]}"
    figures: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith('{"part"'):
            row = json.loads(line)
            figures[row.pop("part")] = row
    if error is not None:
        figures["error"] = error
    figures["wall_s"] = time.perf_counter() - started
    return figures


def _line(row: Any) -> str:
    if not isinstance(row, dict):
        return f"{row:.1f}" if isinstance(row, float) else str(row)
    parts = []
    for name, value in row.items():
        if name.endswith("of_limit"):
            parts.append(f"{name} {100 * value:.0f} %")
        elif name.endswith("_s") and not name.endswith("_per_s"):
            parts.append(f"{name} {1e6 * value:,.0f} µs")
        else:
            parts.append(f"{name} {value:,.0f}" if isinstance(value, float | int) else f"{name} {value}")
    return ", ".join(parts)


def bandwidth(device: torch.device) -> float:
    """Bytes/s that a copy on the device reads and writes, the median of twenty."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.randint(127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(_seconds(lambda: target.copy_(source), device) for _ in range(20))


def pacos(
    device: torch.device,
    shape: DecoderConfig,
    batches: Batches,
    *,
    scheme: str | None = None,
    overlaps: bool = True,
    **changes: Any,
) -> None:
    """The engine. `overlaps` False: kernels wait for those in front of them to end."""
    if not overlaps:
        from app.engine import gpu

        gpu.can_overlap = lambda device: False
    model = Decoder(shape)
    model.initialize(generator=torch.Generator().manual_seed(SEED))
    model.requires_grad_(False).to(device)
    if scheme is not None:
        quantize(model, QuantizationConfig.model_validate({"scheme": scheme}))
    model.bfloat16()
    for batch_size in batches:
        settings = EngineSettings(
            max_batch_size=batch_size, max_queue=512, max_step_tokens=4096, reuse_prefixes=False, max_extra_blocks=0,
            max_kv_bytes=None if shape is TINY else 2**35, int8_head=scheme is not None, **changes,
        )  # fmt: skip
        _report(f"batch {batch_size}", _decoding(Engine(model, settings), batch_size, shape.vocab_size, device))
    settings = replace(settings, max_batch_size=64)
    requests = [(request.ids, request.new_tokens) for request in workload("W2", scale=0.1 if shape is TINY else 1.0)]
    engine = Engine(model, settings)
    _generate(engine, [(ids, 40) for ids, _ in requests])  # records the steps of most numbers of rows
    _generate(engine, requests)
    seconds = _seconds(lambda: _generate(engine, requests), device)
    _report("W2", {"tokens_per_s": sum(count for _, count in requests) / seconds})


def _decoding(engine: Engine, batch_size: int, vocab_size: int, device: torch.device) -> dict[str, Any]:
    """Steps in which all of a batch decode: wall time, and of the recorded step the GPU's alone."""
    requests = _random_requests(batch_size, vocab_size)
    started = time.perf_counter()
    _generate(engine, [(ids, 20) for ids, _ in requests])
    warm_up_s = time.perf_counter() - started
    times, started = [], time.perf_counter()
    for ids, new_tokens in requests:
        engine.add_request(ids, Sampling(max_tokens=new_tokens))
    tokens = 0
    while engine.has_work:
        step_started = time.perf_counter()
        events = engine.step()
        times.append(time.perf_counter() - step_started)
        tokens += len(events)
    total_s = time.perf_counter() - started
    decoding = times[-(NEW - 1) + 5 : -1]
    row: dict[str, Any] = {
        "step_s": statistics.mean(decoding),
        "median_step_s": statistics.median(decoding),
        "tokens_per_s": batch_size / statistics.mean(decoding),
        "bytes": _bytes_read(engine, batch_size),
        "total_tokens_per_s": tokens / total_s,
        "warm_up_s": warm_up_s,
    }
    if engine._decoding is not None:
        row["steps_ahead"] = engine._decoding.num_ahead
        row["replay_s"] = _replay_s(engine._decoding._step(batch_size), device)
    return row


@torch.inference_mode()
def _replay_s(step: Any, device: torch.device) -> float:
    """The GPU's time for one step, of the rows that were there last; each replay goes one place on."""
    before = step.numbers.clone()
    for _ in range(3):
        step.replay()
    step.numbers.copy_(before)
    seconds = _seconds(lambda: [step.replay() for _ in range(20)], device) / 20
    step.numbers.copy_(before)
    return seconds


def _bytes_read(engine: Engine, batch_size: int) -> int:
    """By a step in the middle of the answers: all weights once, and each row's keys and values."""
    model, head = engine.deltas.model.base, engine._runner.head
    layers = [*model.blocks, model.final_norm, head]
    weights = sum(part.nbytes for layer in layers for part in [*layer.parameters(), *layer.buffers()])
    cache = engine._cache
    place = sum(part[:, 0, :, :, 0].nbytes for part in (cache.keys, cache.values.transpose(-1, -2)))
    return weights + batch_size * (PROMPT + NEW // 2) * place


def transformers_static(device: torch.device, shape: DecoderConfig, batches: Batches) -> None:
    """`generate` with a static cache, whose decoding it compiles and records by itself."""
    model = _transformers_model(device, shape)
    for batch_size in batches:
        ids = torch.tensor([ids for ids, _ in _random_requests(batch_size, model.config.vocab_size)], device=device)

        clock = _Clock()

        def generate(ids: torch.Tensor = ids, clock: _Clock = clock) -> None:
            clock.times.clear()
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                pad_token_id=0, cache_implementation="static", logits_processor=[clock],
            )  # fmt: skip

        warm_up_s = _seconds(generate, device)
        generate()
        total_s = _seconds(generate, device)
        step_s = (clock.times[-1] - clock.times[5]) / (len(clock.times) - 6)
        _report(
            f"batch {batch_size}",
            {"step_s": step_s, "tokens_per_s": batch_size / step_s, "total_s": total_s, "warm_up_s": warm_up_s},
        )


class _Clock:
    """A logits processor that changes nothing, and notes when each step calls it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def transformers_continuous(device: torch.device, shape: DecoderConfig, batches: Batches) -> None:
    """Its continuous batching, which starts a manager for each call: the time of a step is from two lengths."""
    from transformers import GenerationConfig

    model = _transformers_model(device, shape)

    def generate(requests: Requests, new_tokens: int) -> int:
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=new_tokens)
        outputs = model.generate_batch([ids for ids, _ in requests], generation_config=config)
        return sum(len(output.generated_tokens) for output in outputs.values())

    for batch_size in batches:
        requests = _random_requests(batch_size, model.config.vocab_size)
        tokens = generate(requests, NEW)
        long = _seconds(lambda: generate(requests, NEW), device)  # noqa: B023 - called here
        short = _seconds(lambda: generate(requests, NEW // 4), device)  # noqa: B023
        step_s = (long - short) / (NEW - NEW // 4)
        _report(
            f"batch {batch_size}",
            {"step_s": step_s, "tokens_per_s": batch_size / step_s, "total_s": long, "tokens": tokens},
        )


def _transformers_model(device: torch.device, shape: DecoderConfig) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(n_layer=shape.num_layers, n_embd=shape.width, n_head=shape.num_heads)
    return GPT2LMHeadModel(config).to(device, torch.bfloat16).eval()


def _random_requests(count: int, vocab_size: int) -> Requests:
    generator = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(vocab_size, (count, PROMPT), generator=generator).tolist()
    return [(ids, NEW) for ids in prompts]


def _generate(engine: Engine, requests: Requests) -> None:
    for ids, new_tokens in requests:
        engine.add_request(ids, Sampling(max_tokens=new_tokens))
    while engine.has_work:
        engine.step()


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def _report(part: str, row: dict[str, Any]) -> None:
    print(json.dumps({"part": part, **row}), flush=True)


CONTENDERS: dict[str, Callable[[torch.device, DecoderConfig, Batches], None]] = {
    "bf16": pacos,
    "int8": partial(pacos, scheme="int8_weight"),
    "bf16 without overlap": partial(pacos, overlaps=False),
    "bf16 without graphs": partial(pacos, cuda_graphs=False),
    "transformers, static cache, compiled": transformers_static,
    "transformers, continuous batching": transformers_continuous,
    "int8 with rounded activations": partial(pacos, scheme="int8_dynamic"),
    "bf16, torch's operations only": partial(pacos, kernels="torch"),
}


if __name__ == "__main__":
    main()
