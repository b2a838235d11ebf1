"""Tokens a second of Pacos's engine beside its peers, GPT-2 124M with random weights, greedy, in one run.

    python -m benchmarks.generation --json benchmarks/results/generation.json

`workloads.py` says what is generated, `contender.py` how each does it, in its best settings: batches of requests of
like length where a peer cannot batch continuously. Every run is a process of its own with all cores, after a warm-up;
contenders take turns, `--repeat` times, and the median counts, of ratios that of runs in the same turn. What takes more
than `--long` seconds is not repeated; what would take more than `--longest`, by its rate with many requests in an
earlier workload, is left out. Contenders in fp32 must agree on every answer's first token. The file is written anew
after every run.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from app.atomic import write_text
from benchmarks.folder import kept_or_temporary
from benchmarks.generation.contender import CONTENDERS
from benchmarks.generation.environments import python_of
from benchmarks.generation.report import plot, summarize, table
from benchmarks.generation.workloads import make_model, workload, write_requests
from benchmarks.machine import describe, has_bf16

TIMEOUT_S = 3600
NEED_BF16 = {"pacos_bf16", "pacos_bf16_32_loras", "transformers_bf16"}


def main() -> None:
    arguments = parse()
    with kept_or_temporary(arguments.folder) as folder:
        compare(arguments, folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = "transformers,ctranslate2,vllm,llamacpp"
    parser.add_argument("--peers", default=peers, help="whom to measure beside Pacos")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="run these contenders alone")
    parser.add_argument("--workloads", default="W1,W2,W3", help="those of workloads.py, as W1 alone")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the requests of W2 and W3")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--long", type=float, default=3600, help="seconds")
    parser.add_argument("--longest", type=float, default=3600, help="seconds")
    parser.add_argument("--folder", type=Path, help="keep model and peers' environments there for the next time")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--plot", type=Path, help="file to draw it to")
    return parser.parse_args()


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    model = folder / "model"
    make_model(model)
    report: dict[str, Any] = {
        "machine": describe("torch", "transformers"),
        "load_average_before": os.getloadavg()[0],
        "scale": arguments.scale,
        "runs": {},
    }
    peers = {"pacos", *arguments.peers.split(",")}
    names = arguments.only or [name for name in CONTENDERS if name.split("_")[0] in peers]
    rates: dict[str, float] = {}
    for load in arguments.workloads.split(","):
        requests = folder / f"{load}.json"
        work = workload(load, scale=arguments.scale)
        write_requests(work, requests)
        tokens = sum(request.new_tokens for request in work)
        names = [name for name in names if tokens / rates.get(name, float("inf")) <= arguments.longest]
        in_turn = names
        for _ in range(arguments.repeat):
            for name in in_turn:
                if name in NEED_BF16 and not has_bf16():
                    run = {"failed": "the processor has no instructions for bf16, which are emulated at a crawl"}
                else:
                    run = run_contender(name, model, requests, folder)
                report["runs"].setdefault(load, {}).setdefault(name, []).append(run)
                _show(load, name, run)
                report = summarize(report)
                if arguments.json:
                    write_text(arguments.json, json.dumps(report, indent=2) + "\n")
            done = {name: runs[-1] for name, runs in report["runs"][load].items() if "failed" not in runs[-1]}
            in_turn = [name for name in in_turn if name in done and done[name]["seconds"] <= arguments.long]
        if len(work) > 1:
            rates = {name: run["tokens"] / run["seconds"] for name, run in done.items()}
    if arguments.plot:
        plot(report, arguments.plot)
    print(table(report))


def run_contender(name: str, model: Path, requests: Path, folder: Path) -> dict[str, Any]:
    """What it printed, or why it failed: the others go on."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    try:
        python = python_of(name.split("_")[0], folder)
        environment["PYTHONPATH"] = str(root) if name.startswith(("pacos", "llamacpp", "vllm")) else ""
        script = Path(__file__).with_name("contender.py")
        command = [python, str(script), name, "--model", str(model), "--requests", str(requests)]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, cwd=root
        )
        return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"tokens"')))
    except subprocess.CalledProcessError as error:
        return {"failed": f"exit status {error.returncode}: {(error.stderr or '').strip()[-600:]}"}
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {TIMEOUT_S} s"}


def _show(load: str, name: str, run: dict[str, Any]) -> None:
    if "failed" in run:
        print(f"{load} {name}: {run['failed'].splitlines()[-1]}", flush=True)
        return
    rate = run["tokens"] / run["seconds"]
    print(f"{load} {name}: {rate:.0f} tokens/s, {run['peak_bytes'] / 2**30:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
