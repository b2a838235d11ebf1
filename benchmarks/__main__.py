"""All recorded benchmarks, one after another, with the commands that their documents name; what `make bench` runs.

    python -m benchmarks --records alpaca_data.json --prompts koala.jsonl vicuna.jsonl --tokenizer path/to/gpt2 \
        --peers path/to/peers

Nothing is fetched. What needs a file that is not named, a GPU or a package that is not there is left out, which is said
at the end; its recorded figures stay. Each is a process of its own, and where one fails the others go on. `--peers` is
the `--folder` of a `python -m benchmarks.generation` that has installed peers there.
"""

import argparse
import importlib.util
import shlex
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS, IMAGES = "benchmarks/results", "docs/images"
PACOS = str(Path(sys.executable).with_name("pacos"))
MODULE = f"{sys.executable} -m benchmarks"


@dataclass(frozen=True)
class Benchmark:
    commands: tuple[str, ...]
    """`{records}` and the like stand for what was named; a benchmark whose commands name more is left out."""
    packages: tuple[str, ...] = ()
    needs_gpu: bool = False


BENCHMARKS = {
    "kernels": Benchmark((f"{MODULE}.kernels --json {RESULTS}/kernels.json",)),
    "attention": Benchmark(
        (f"{MODULE}.attention --json {RESULTS}/attention.json --plot {IMAGES}/attention.png",)
    ),
    "kv_cache": Benchmark((f"{MODULE}.kv_cache --json {RESULTS}/kv_cache.json --plot {RESULTS}/kv_cache.png",)),
    "generation": Benchmark(
        (f"{MODULE}.generation --peers {{installed}} --repeat 2 --long 25 --longest 200 --folder {{peers}} "
         f"--json {RESULTS}/generation.json --plot {RESULTS}/generation.png",)
    ),
    "engine_soak": Benchmark((f"{MODULE}.engine_soak --minutes 20 --json {RESULTS}/engine_soak.json",)),
    "retrieval": Benchmark((f"{MODULE}.retrieval --width 128 --json {RESULTS}/retrieval.json",)),
    "semantic_cache": Benchmark((f"{MODULE}.semantic_cache --json {RESULTS}/semantic_cache.json",)),
    "sweeps-gpt2": Benchmark(
        (f"{MODULE}.sweeps --model gpt2-random --rows 16 --held-out 32 --steps 6 --json {RESULTS}/sweeps-gpt2.json",)
    ),
    "sweeps": Benchmark(
        (f"{PACOS} prepare source={{records}} layout.type=packed output=runs/bench/packed",
         f"{MODULE}.sweeps --data runs/bench/packed --steps 20 --json {RESULTS}/sweeps.json")
    ),
    "techniques": Benchmark(
        (f"{PACOS} prepare source={{records}} max_length=448 output=runs/bench/448",
         f"{MODULE}.techniques --data runs/bench/448 --json {RESULTS}/techniques.json "
         f"--plot {IMAGES}/techniques.png")
    ),
    "data": Benchmark(
        (f"{MODULE}.data --source {{records}} --tokenizer {{tokenizer}} --json {RESULTS}/data.json",),
        packages=("datasets",),
    ),
    "training": Benchmark(
        (f"{MODULE}.training --source {{records}} --tokenizer {{tokenizer}} --json {RESULTS}/training.json "
         f"--plot {IMAGES}/training.png",),
        packages=("accelerate", "peft"),
    ),
    "serving": Benchmark(
        (f"{MODULE}.serving --prompts {{prompts}} --proxy haproxy --json {RESULTS}/serving.json",)
    ),
    "scale": Benchmark(
        (f"{MODULE}.scale.measure --prompts {{prompt_file}} --source {{records}} --json {RESULTS}/scale-measured.json",
         f"{MODULE}.scale --json {RESULTS}/scale.json --plots {IMAGES}")
    ),
    "gpu-generation": Benchmark((f"{MODULE}.gpu.generation --json {RESULTS}/gpu-generation.json",), needs_gpu=True),
    "gpu-training": Benchmark((f"{MODULE}.gpu.training --json {RESULTS}/gpu-training.json",), needs_gpu=True),
    "pretraining": Benchmark(
        (f"{MODULE}.pretraining {{records}} --passes 8 --device cuda --jobs 8 --json {RESULTS}/pretraining.json "
         f"--plot {IMAGES}/base-shapes.png",),
        needs_gpu=True,
    ),
}  # fmt: skip
"""By the name of the result."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", help="instruction records, a JSON array")
    parser.add_argument("--prompts", nargs="+", help="JSON Lines with `prompt` or `text`")
    parser.add_argument("--tokenizer", help="folder with GPT-2's vocab.json and merges.txt")
    parser.add_argument("--peers", default="runs/bench/peers", help="folder where peers are installed")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--show", action="store_true", help="print the commands, and run nothing")
    arguments = parser.parse_args()
    named = words_of(arguments)
    left_out, failed = {}, []
    for name in arguments.only:
        benchmark = BENCHMARKS[name]
        if missing := what_is_missing(benchmark, named):
            left_out[name] = missing
            continue
        for command in benchmark.commands:
            words = shlex.split(command.format(**named))
            print(shlex.join(words), flush=True)
            if not arguments.show and subprocess.run(words).returncode:
                failed.append(name)
                break
    for name, missing in left_out.items():
        print(f"left out: {name}, without {missing}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def words_of(arguments: argparse.Namespace) -> dict[str, str]:
    """What the commands name, quoted for the shell; without what was not given."""
    known = ("ctranslate2", "vllm", "llamacpp")
    peers = [peer for peer in known if (Path(arguments.peers) / peer / "installed").exists()]
    prompts = arguments.prompts or []
    words = {
        "records": [arguments.records],
        "prompts": prompts,
        "prompt_file": prompts[:1],
        "tokenizer": [arguments.tokenizer],
        "peers": [arguments.peers],
        "installed": [",".join(["transformers", *peers])],
    }
    return {name: shlex.join(given) for name, given in words.items() if any(given)}


def what_is_missing(benchmark: Benchmark, named: dict[str, str]) -> str:
    fields = {field for command in benchmark.commands for _, field, *_ in string.Formatter().parse(command) if field}
    options = sorted({f"--{'prompts' if field == 'prompt_file' else field}" for field in fields - named.keys()})
    packages = [package for package in benchmark.packages if importlib.util.find_spec(package) is None]
    device = ["a GPU"] if benchmark.needs_gpu and not torch.cuda.is_available() else []
    return ", ".join([*options, *packages, *device])


if __name__ == "__main__":
    main()
