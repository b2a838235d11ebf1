"""LoRA of GPT-2 124M on Alpaca: Hugging Face `Trainer` + PEFT beside Pacos, on the same records and the same model.

    python -m benchmarks.training --source alpaca_data.json --tokenizer path/to/gpt2 \
        --json benchmarks/results/training.json --plot docs/images/training.png

`task.py` says what all train, `peers.py` and `pacos.py` how each does it, `flops.py` what MFU is. Every run is a
process of its own, with all cores, and the contenders come in turn; those named `…_spare` train with one thread less,
which leaves a core to Ray's own processes, and are left out where that would leave no thread. The first step of a run
warms caches up and is not measured. The slow contenders make one pass over the records, the fast ones `--passes`, and
`--repeat` runs, of which that with the median speed counts. Tokens are those of the records, padding never counted.

Peak memory is that of the process that trains; of the tree of processes, Ray's daemons among them, it is the largest
sum of resident memory seen, in which what processes share counts more than once. Of `trainer_tuned`, bf16 weights run
only where the processor has instructions for bf16, since they are emulated elsewhere, at a fraction of fp32's speed;
`trainer_bf16` runs anyway, because that is what the bar names. The labels of `pad_512` are every token, padding too:
its training loss is not comparable, its held-out loss is.

The file is written anew after every run, so that one that is stopped has lost no more than the run it was in.
"""

import argparse
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from app.atomic import write_text
from benchmarks.folder import kept_or_temporary
from benchmarks.machine import describe
from benchmarks.training.processes import run_needed, run_part
from benchmarks.training.report import plot, summarize, table

SLOW = ("trainer_fp32", "trainer_bf16", "pad_512")
SPARE = ("pacos_process_spare", "pacos_ray_spare")
FAST = ("trainer_tuned_fp32", "trainer_tuned_bf16", "pacos_process_padded", "pacos_process", "pacos_ray", *SPARE)
NEEDED = ("accelerate", "peft", "psutil")


def main() -> None:
    arguments = parse()
    if arguments.part:
        from benchmarks.training.parts import PARTS

        print(json.dumps(PARTS[arguments.part](arguments)))
        return
    check_packages()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contender ends too, and the folder goes
    with kept_or_temporary(arguments.folder) as folder:
        compare(arguments, folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="Alpaca's records, a JSON array")
    parser.add_argument("--tokenizer", required=True, help="folder with GPT-2's vocab.json and merges.txt")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of 16 records in a pass")
    parser.add_argument("--passes", type=int, default=3, help="passes of the fast contenders")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each fast contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each contender; all cores by default")
    parser.add_argument("--packed-length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--only", nargs="+", choices=(*SLOW, *FAST), help="run these alone")
    parser.add_argument("--folder", type=Path, help="keep model and data there for the next time; else they go")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--plot", type=Path, help="file to draw it to")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps * arguments.passes < 2:
        parser.error("--steps times --passes is 1, and a rate by the clock needs 2 steps; raise either")
    return arguments


def check_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"benchmarks.training needs {', '.join(missing)}; "
            "install them with: pip install --constraint constraints.txt --editable '.[bench]'"
        )


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Run all in turn, and report after each."""
    report: dict[str, Any] = {
        "machine": describe("torch", "transformers", "peft", "accelerate", "ray", "deepspeed"),
        "threads": arguments.threads,
        "steps": arguments.steps,
        "passes": arguments.passes,
        "load_average_before": os.getloadavg()[0],
    }
    report["task"] = run_needed("inputs", arguments, folder)
    print(f"records: {report['task']}", flush=True)
    report["peak"] = run_needed("peak", arguments, folder)
    print(f"matrix peak: {report['peak']['flops_per_s'] / 1e9:.0f} GFLOP/s", flush=True)
    report["runs"] = {}
    for number in range(arguments.repeat):
        for name in (*SLOW, *FAST):
            if (arguments.only and name not in arguments.only) or (number and name in SLOW):
                continue
            run = run_contender(name, arguments, folder)
            report["runs"].setdefault(name, []).append(run)
            report = summarize(report)
            _show(name, number, report)
            if arguments.json:
                write_text(arguments.json, json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        plot(report, arguments.plot)
    print(table(report))
    for bar in report["bars"]:
        print(
            f"{'reached' if bar['reached'] else 'NOT reached'}: {bar['name']}: {bar['measured']:.3g} (bar {bar['bar']})"
        )


def run_contender(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run of a contender with as many threads as it has."""
    threads = arguments.threads - (name in SPARE)
    if not threads:
        return {"skipped": f"threads={arguments.threads} leaves none to train beside a spare core"}
    return {"threads": threads, **run_part(name, argparse.Namespace(**{**vars(arguments), "threads": threads}), folder)}


def _show(name: str, number: int, report: dict[str, Any]) -> None:
    run = report["runs"][name][-1]
    if reason := run.get("skipped") or run.get("failed"):
        print(f"{number + 1} {name}: {reason}", flush=True)
        return
    print(
        f"{number + 1} {name}: {run['tokens_per_s']:.1f} tokens/s, {run['peak_bytes'] / 2**30:.2f} GiB, "
        f"loss {run['steps'][0]['loss']:.4f} → {run['steps'][report['steps']]['loss']:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
