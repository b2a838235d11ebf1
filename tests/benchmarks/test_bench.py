"""`make bench` measures every recorded figure again, with commands that the benchmarks take."""

import argparse
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, PACOS, Benchmark, what_is_missing, words_of
from tests.documentation.checking import check
from tests.documentation.reading import Command

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
APART = {"soak"}
"""`make soak`."""
ALL = {"records": "a.json", "prompts": "k.jsonl", "prompt_file": "k.jsonl", "tokenizer": "gpt2", "peers": "peers",
       "installed": "transformers,vllm"}  # fmt: skip


def test_every_result_is_measured_again() -> None:
    text = " ".join(command for benchmark in BENCHMARKS.values() for command in benchmark.commands)
    recorded = {file.stem for file in RESULTS.glob("*.json")} - APART
    assert recorded and all(f"benchmarks/results/{name}.json" in text for name in recorded)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_its_commands_are_taken(name: str) -> None:
    for command in BENCHMARKS[name].commands:
        program, *words = shlex.split(command.format(**ALL))
        assert program in (PACOS, sys.executable)
        assert check(Command(name, ("pacos" if program == PACOS else "python", *words)))


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/installed").touch()
    given = argparse.Namespace(records=None, prompts=["a file.jsonl", "b.jsonl"], tokenizer=None, peers=str(tmp_path))
    named = words_of(given)
    assert named["installed"] == "transformers,vllm" and named["prompts"] == "'a file.jsonl' b.jsonl"
    assert named["prompt_file"] == "'a file.jsonl'"
    assert what_is_missing(BENCHMARKS["kernels"], named) == what_is_missing(BENCHMARKS["serving"], named) == ""
    assert what_is_missing(BENCHMARKS["training"], named).startswith("--records, --tokenizer")
    assert what_is_missing(Benchmark(("x",), packages=("no_such_package",)), named) == "no_such_package"
