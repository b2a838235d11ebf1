import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from app.config import FullConfig, LoraConfig, MethodConfig
from app.data.batches import Batch
from app.methods import apply_method
from app.models.decoder import GPT2_SIZES, Decoder
from app.training.loss import masked_nll
from benchmarks.training import __main__ as benchmark
from benchmarks.training import parts
from benchmarks.training.flops import attention_flops, full_step_flops, lora_step_flops
from benchmarks.training.report import summarize, table
from benchmarks.training.task import TASK_FILE, Task

SHAPE = replace(GPT2_SIZES["gpt2"], vocab_size=96, context_length=32, num_layers=3, num_heads=2, width=16, mlp_width=64)
ROWS, TIME, ANSWERS, RANK = 2, 16, 14, 4  # together no number that would be filled up


def counted_flops(method: MethodConfig) -> float:
    """What torch counts in forward and backward pass over full rows, of which some tokens have labels."""
    model = Decoder(SHAPE)
    model.initialize(generator=torch.Generator().manual_seed(0))
    apply_method(model, method)
    model.attention = "math"  # the counter knows no other of the CPU's kernels
    mask = torch.zeros(ROWS, TIME, dtype=torch.bool)
    mask[:, -ANSWERS // ROWS :] = True
    batch = Batch(torch.randint(SHAPE.vocab_size, (ROWS, TIME)), mask, ROWS * TIME)
    with FlopCounterMode(display=False) as counter:
        masked_nll(model, batch)[0].backward()
    return counter.get_total_flops()


def square_for_half() -> float:
    """What the counter has more: it counts whole score matrices, and the formula the half that causality leaves."""
    return 3 * attention_flops(SHAPE, ROWS * (TIME * TIME - TIME * (TIME + 1) / 2))


def test_flops_of_lora_are_those_that_torch_counts() -> None:
    formula = lora_step_flops(SHAPE, [TIME] * ROWS, answers=ANSWERS, rank=RANK)
    outputs = SHAPE.num_layers * (5 * SHAPE.width + SHAPE.mlp_width)
    uncounted = 2 * ROWS * TIME * RANK * outputs  # the update's second product: the counter does not know addmm_
    assert formula + square_for_half() == counted_flops(LoraConfig(rank=RANK)) + uncounted


def test_flops_of_full_training_are_those_that_torch_counts() -> None:
    formula = full_step_flops(SHAPE, [TIME] * ROWS, answers=ANSWERS)
    uncounted = 2 * SHAPE.width * SHAPE.vocab_size * ANSWERS  # the head's weight: the counter does not know addmm_
    assert formula + square_for_half() == counted_flops(FullConfig()) + uncounted


def run_of(seconds: float, *, loss: float = 10.8, gib: float = 1.0, tokens: int = 1000) -> dict:
    steps = [{"seconds": 9.0, "tokens": tokens, "loss": loss}] + [
        {"seconds": seconds, "tokens": tokens, "loss": 9.0}
    ] * 2
    return {
        "steps": steps,
        "held_out_loss": {"0": 10.8, "3": 9.0},
        "wall_tokens_per_s": tokens / seconds,
        "trained": 7,
        "computed_in": "fp32",
        "peak_bytes": gib * 2**30,
        "tree_peak_bytes": gib * 2**30,
    }


def report_of(**runs: list[dict]) -> dict:
    return {"steps": 2, "task": {"flops_per_token": 1e6}, "peak": {"flops_per_s": 1e10}, "runs": runs}


def test_bars_are_measured_by_the_median_run_and_against_the_fastest_peer() -> None:
    report = summarize(
        report_of(
            trainer_fp32=[run_of(20.0, gib=12.0)],
            trainer_tuned_fp32=[run_of(2.0), run_of(4.0), run_of(1.0)],
            pacos_process=[run_of(1.0), run_of(0.5), run_of(3.0)],
            pacos_ray=[run_of(1.25)],
        )
    )
    bars = {bar["name"]: (bar["measured"], bar["reached"]) for bar in report["bars"]}
    assert bars == {
        "tokens/s over Trainer's in fp32": (pytest.approx(20), True),
        "peak memory over Trainer's in fp32": (pytest.approx(1 / 12), True),
        "tokens/s over the best peer's, trainer_tuned_fp32": (pytest.approx(2), True),
        "what Ray Train costs in the steps": (pytest.approx(0.2), False),
        "what Ray Train costs by the clock": (pytest.approx(0.2), False),
    }
    assert report["contenders"]["pacos_process"]["mfu"] == pytest.approx(1000 * 1e6 / 1e10)
    assert "| pacos_ray | 800 | 8.0 % | 1.00 GiB |" in table(report)


def test_what_ray_costs_beside_a_spare_core_is_measured_against_the_process_that_leaves_one_too() -> None:
    spare = {"pacos_process_spare": [run_of(2.0) | {"threads": 1}], "pacos_ray_spare": [run_of(2.05) | {"threads": 1}]}
    report = summarize(report_of(pacos_process=[run_of(1.0)], pacos_ray=[run_of(1.25)], **spare))
    bars = {bar["name"]: (bar["measured"], bar["reached"]) for bar in report["bars"]}
    assert bars == {
        "what Ray Train costs in the steps": (pytest.approx(0.2), False),
        "what Ray Train costs by the clock": (pytest.approx(0.2), False),
        "what Ray Train costs with a core to spare, in the steps": (pytest.approx(1 - 2 / 2.05), True),
        "what Ray Train costs with a core to spare, by the clock": (pytest.approx(1 - 2 / 2.05), True),
    }
    alone = summarize(report_of(**spare))
    assert [bar["name"] for bar in alone["bars"]] == [name for name in bars if "spare" in name]
    with pytest.raises(AssertionError, match="first packed loss differs"):
        summarize(report_of(pacos_process=[run_of(1.0)], pacos_ray_spare=[run_of(2.0, loss=10.9)]))


def test_a_spare_contender_has_one_thread_less_and_no_run_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, int]] = []

    def run_part(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
        ran.append((name, arguments.threads))
        return run_of(1.0)

    monkeypatch.setattr(benchmark, "run_part", run_part)
    runs = [
        benchmark.run_contender(name, argparse.Namespace(threads=threads), tmp_path)
        for threads in (2, 1)
        for name in ("pacos_ray", "pacos_process_spare", "pacos_ray_spare")
    ]
    assert ran == [("pacos_ray", 2), ("pacos_process_spare", 1), ("pacos_ray_spare", 1), ("pacos_ray", 1)]
    assert [run.get("threads") for run in runs] == [2, 1, 1, 1, None, None]
    assert all("leaves none to train" in run["skipped"] for run in runs[4:])


def test_a_part_trains_with_the_threads_it_was_given_not_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(str(tmp_path), steps=1, passes=1, threads=2)
    task.path(TASK_FILE).write_text(json.dumps(asdict(task)))
    for function in ("through_ray", "in_process"):
        monkeypatch.setattr(parts.pacos, function, lambda task, *layout: {"threads": task.threads})
    for name in ("pacos_ray_spare", "pacos_process_spare"):
        assert parts.PARTS[name](argparse.Namespace(folder=str(tmp_path), threads=1)) == {"threads": 1}


def test_a_contender_that_starts_elsewhere_is_told() -> None:
    with pytest.raises(AssertionError, match="first step's loss differs"):
        summarize(report_of(trainer_tuned_fp32=[run_of(1.0)], pacos_process_padded=[run_of(1.0, loss=10.9)]))


def test_a_run_that_failed_leaves_the_others_their_figures() -> None:
    report = summarize(report_of(pad_512=[{"failed": "exit status -9"}], pacos_process=[run_of(1.0)]))
    assert list(report["contenders"]) == ["pacos_process"]
    assert report["runs"]["pad_512"] == [{"failed": "exit status -9"}]


def test_the_gpu_benchmark_runs_without_ray_deepspeed_and_transformers(tmp_path: Path) -> None:
    result = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu.training", "--device", "cpu", "--tiny", "--steps", "2"]
    subprocess.run([*command, "--json", str(result)], check=True, cwd=Path(__file__).parents[2])
    report = json.loads(result.read_text())
    assert report["imported"] == []
    assert set(report["results"]) == {"full", "lora"}
    assert all(figures["tokens_per_s"] > 0 and 0 < figures["mfu"] < 1 for figures in report["results"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_says_that_there_is_no_gpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.training"]
    done = subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.startswith("skipped: there is no CUDA device")
