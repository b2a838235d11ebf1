"""Eight LoRA runs, ranks 1 to 64 and learning rates of their own: packed over one base, and one after another.

    pacos prepare source=alpaca_data.json layout.type=packed output=runs/alpaca/data
    python -m benchmarks.sweeps --data runs/alpaca/data --json benchmarks/results/sweeps.json

Every run is a process of its own with one base, as is the pack; so starting Python and loading the base count. All
train on the same rows, step by step, and are evaluated on the same held-out records before and after. Memory is that of
whole processes, or on a GPU what torch took there. `--model gpt2-random` is GPT-2 124M with random weights, on random
records of Alpaca's lengths; it needs no `--data`. `--device cuda` wants a larger `--pass-tokens`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.training.processes import TreeWatch

RANKS = (1, 2, 4, 8, 16, 24, 32, 64)
RATES = (5e-3, 5e-3, 4e-3, 3e-3, 3e-3, 2e-3, 2e-3, 1e-3)


def main() -> None:
    arguments = _arguments()
    if arguments.part:
        print(json.dumps(_part(arguments)))
        return
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in _OPTIONS]
    alone = [_process([*options, f"--part={number}"]) for number in range(len(RANKS))]
    packed = _process([*options, "--part=packed"])
    beside = _side_by_side([*options, "--threads=1"], numbers=(3, 4))
    figures = {
        "machine": describe("torch"),
        "settings": {name: getattr(arguments, name) for name in _OPTIONS if name != "data"},
        "ranks": RANKS,
        "one_after_another": {
            "wall_s": sum(part["wall_s"] for part in alone),
            "cpu_s": sum(part["cpu_s"] for part in alone),
            "steps_s": sum(part["steps_s"] for part in alone),
            "peak_bytes": max(part["peak_bytes"] for part in alone),
        },
        "two_side_by_side": beside,
        "packed": {key: packed[key] for key in ("wall_s", "cpu_s", "steps_s", "peak_bytes")},
        "largest_difference_of_a_loss": max(
            abs(mine - theirs)
            for part, of_run in zip(alone, packed["losses"], strict=True)
            for mine, theirs in zip(part["losses"][0], of_run, strict=True)
        ),
        "held_out_losses": [of_run[-1] for of_run in packed["losses"]],
    }
    figures["trials_an_hour_packed_over_alone"] = figures["one_after_another"]["wall_s"] / figures["packed"]["wall_s"]
    figures["memory_packed_over_two"] = figures["packed"]["peak_bytes"] / beside["peak_bytes"]
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


_OPTIONS = ("model", "data", "steps", "rows", "precision", "threads", "pass_tokens", "held_out", "device")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder that `pacos prepare` wrote")
    parser.add_argument("--model", default="embedded", help="`embedded`, a folder, or `gpt2-random`")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4, help="of a step of each run")
    parser.add_argument("--held-out", type=int, default=128, help="records of each evaluation")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pass-tokens", type=int, default=2048)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _process(options: list[str]) -> dict[str, Any]:
    """What a part prints, with the time from its start to its end and the CPU time of all of it."""
    command = [sys.executable, "-m", "benchmarks.sweeps", *options]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = sum(getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime"))
    return {**json.loads(output.splitlines()[-1]), "wall_s": wall_s, "cpu_s": cpu_s}


def _side_by_side(options: list[str], *, numbers: tuple[int, int]) -> dict[str, float]:
    """Two runs at once, a thread each: how long that takes, and the memory of both."""
    started = time.perf_counter()
    commands = [[sys.executable, "-m", "benchmarks.sweeps", *options, f"--part={number}"] for number in numbers]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    watches = [TreeWatch(process.pid) for process in processes]
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    peaks = [watch.stop() for watch in watches]
    if "--device=cuda" in options:
        peaks = [json.loads(output.splitlines()[-1])["peak_bytes"] for output in outputs]
    return {"wall_s": time.perf_counter() - started, "peak_bytes": sum(peaks)}


def _part(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, or all of them packed, in this process."""
    import torch

    torch.set_num_threads(arguments.threads)
    is_packed = arguments.part == "packed"
    runs = range(len(RANKS)) if is_packed else [int(arguments.part)]
    rows = (_packed if is_packed else _alone)(arguments, runs)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    if arguments.device == "cuda":
        peak = torch.cuda.max_memory_reserved()
    return {
        "losses": [[row["loss"] for row in of_run if "loss" in row] + [of_run[-1]["eval_loss"]] for of_run in rows],
        "steps_s": sum(row.get("step_s", 0.0) for of_run in rows for row in of_run),
        "peak_bytes": peak,
    }


def _alone(arguments: argparse.Namespace, runs: Any) -> list[list[dict[str, Any]]]:
    import torch

    from app.methods import apply_method
    from app.training import loop
    from app.training.optimizer import PlainOptimizer
    from app.training.precision import store_frozen

    (number,) = runs
    model, plan, validation = _base(arguments), _plan(arguments, number), _held_out(arguments)
    torch.manual_seed(plan.seed)
    apply_method(model, _method(number))
    model.to(arguments.device)
    store_frozen(model, plan.precision, torch.device(arguments.device))
    rows: list[dict[str, Any]] = []
    loop.run(
        model,
        PlainOptimizer(model, plan.optimizer),
        plan=plan,
        start_step=0,
        batches=_batches(arguments),
        validation=lambda: validation,
        report=rows.append,
        save=lambda step, metrics: None,
    )
    return [rows]


def _packed(arguments: argparse.Namespace, runs: Any) -> list[list[dict[str, Any]]]:
    import torch

    from app.training.pack import Pack

    device = torch.device(arguments.device)
    base, validation = _base(arguments), _held_out(arguments)
    pack = Pack(base, precision=arguments.precision, device=device, pass_tokens=arguments.pass_tokens)
    members = [
        pack.new_member(
            str(number),
            _method(number),
            plan=_plan(arguments, number),
            batches=lambda step: _batches(arguments, step),
            validation=validation,
        )
        for number in runs
    ]
    rows: dict[str, list[Any]] = {name: [first] for name, first in pack.begin(members).items()}
    for _ in range(arguments.steps):
        for name, metrics in pack.step(members).items():
            rows[name].append(metrics)
    return list(rows.values())


def _base(arguments: argparse.Namespace) -> Any:
    import torch

    from app.assets import model_folder
    from app.models.checkpoints import load_decoder
    from app.models.decoder import GPT2_SIZES, Decoder

    if arguments.model != "gpt2-random":
        return load_decoder(model_folder(arguments.model))
    model = Decoder(GPT2_SIZES["gpt2"])
    model.initialize(generator=torch.Generator().manual_seed(0))
    return model


def _method(number: int) -> Any:
    from app.config import LoraConfig

    return LoraConfig(rank=RANKS[number], alpha=2 * RANKS[number])


def _plan(arguments: argparse.Namespace, number: int) -> Any:
    from app.config import OptimizerConfig
    from app.training.loop import Plan

    return Plan(
        total_steps=arguments.steps,
        eval_every=arguments.steps,
        save_every=arguments.steps,
        optimizer=OptimizerConfig(learning_rate=RATES[number]),
        precision=arguments.precision,
        seed=number,
        is_packed=arguments.model != "gpt2-random",
    )


def _batches(arguments: argparse.Namespace, first_step: int = 0) -> Iterator[Any]:
    """The rows of each step, the same for every run."""
    from app.data.feed import Feed
    from app.data.shards import read_manifest

    if arguments.model == "gpt2-random":
        return (_random_batch(step, rows=arguments.rows) for step in range(first_step, arguments.steps))
    manifest = read_manifest(arguments.data)
    feed = Feed.of(manifest, batch_size=arguments.rows, total_steps=arguments.steps, seed=0)
    return feed.local_batches(first_step)


def _held_out(arguments: argparse.Namespace) -> list[Any]:
    from app.data.batches import batches_by_length
    from app.data.shards import COLUMNS, read_manifest

    if arguments.model == "gpt2-random":
        return [_random_batch(-1 - number, rows=16) for number in range(arguments.held_out // 16)]
    table = read_manifest(arguments.data).read("validation").slice(0, arguments.held_out)
    return list(batches_by_length(zip(*(table[name].to_numpy() for name in COLUMNS), strict=True), size=16))


def _random_batch(number: int, *, rows: int) -> Any:
    """Records a row, with a mean of 82 tokens, as Alpaca's have in GPT-2's vocabulary; two thirds are in the loss."""
    import numpy as np

    from app.data.batches import collate

    draw = np.random.default_rng(1000 + number)
    lengths = np.clip(draw.lognormal(np.log(68), 0.6, rows), 12, 512).astype(int)
    ids = [draw.integers(50257, size=length) for length in lengths]
    return collate(ids, [np.arange(length) >= length // 3 for length in lengths])


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
