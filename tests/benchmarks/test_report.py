"""benchmarks/REPORT.md: all committed figures, and no other."""

import json
from pathlib import Path

from benchmarks.report.__main__ import REPORT, RESULTS, render
from benchmarks.report.tables import number

MACHINE = {"processor": "A", "cores": 2, "memory_gib": 8, "system": "Linux x86_64", "python": "3.12.1", "torch": "2.13"}


def report_of(folder: Path, **results: object) -> str:
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return render(folder)


def test_the_committed_report_is_the_one_that_is_generated() -> None:
    assert REPORT.read_text() == render(), "run `python -m benchmarks.report`"


def test_every_result_file_has_a_section() -> None:
    text = render()
    for file in RESULTS.glob("*.json"):
        assert f"[results/{file.name}](results/{file.name})" in text


def test_a_result_that_nobody_described_is_shown_by_its_paths(tmp_path: Path) -> None:
    text = report_of(tmp_path, chaos={"machine": MACHINE, "kills": {"workers": 12, "lost": 0}, "runs": [1, 2]})
    assert "## chaos" in text and "| kills.workers | 12 |" in text and "| kills.lost | 0 |" in text
    assert "runs" not in text.split("## chaos")[1]
    assert "Machine: A, 2 cores, 8 GiB, Linux x86_64. Versions: python 3.12.1, torch 2.13." in text


def test_missed_goals_are_counted_and_told(tmp_path: Path) -> None:
    bars = [
        {"name": "requests without an answer", "bar": "0", "measured": 0, "reached": True},
        {"workload": "W2", "ours": "pacos_int8", "peer": "vllm_bf16", "bar": 2.0, "measured": 1.61, "reached": False},
    ]
    text = report_of(tmp_path, other={"machine": MACHINE, "bars": bars, "passed": False})
    assert "Of 3 goals 2 are missed." in text
    assert "| other: W2, pacos_int8 over vllm_bf16 | at least 2 | 1.61 | **no** |" in text
    assert "| other: requests without an answer | 0 | 0 | yes |" in text


def test_what_the_sweep_benchmark_writes_has_a_section(tmp_path: Path) -> None:
    part = {"wall_s": 100.0, "cpu_s": 150.0, "steps_s": 90.0, "peak_bytes": 2**30}
    sweeps = {
        "machine": MACHINE,
        "settings": {"model": "embedded", "steps": 30},
        "ranks": [1, 2],
        "one_after_another": part,
        "packed": part | {"wall_s": 50.0},
        "two_side_by_side": {"wall_s": 60.0, "peak_bytes": 2**31},
        "largest_difference_of_a_loss": 0.00001,
        "trials_an_hour_packed_over_alone": 2.0,
        "memory_packed_over_two": 0.5,
    }
    text = report_of(tmp_path, sweeps=sweeps)
    assert "| the same 2 packed | 50 | 150 | 90 | 1.00 GiB |" in text
    assert "packed over alone: 2 times" in text and "1.0e-05" in text


def test_contenders_that_left_a_core_are_named_and_results_from_before_them_still_shown(tmp_path: Path) -> None:
    run = {"tokens_per_s": 800, "mfu": 0.5, "peak_bytes": 2**30, "computed_in": "bf16", "first_loss": 11.0,
           "loss_after_a_pass": 9.5}  # fmt: skip
    before = {"machine": MACHINE, "threads": 2, "contenders": {"pacos_process": run}}
    assert "GPT-2 124M, 2 threads.\n" in report_of(tmp_path, training=before)
    contenders = {"pacos_process": run | {"threads": 2}, "pacos_ray_spare": run | {"threads": 1}}
    text = report_of(tmp_path, training=before | {"contenders": contenders})
    assert "GPT-2 124M, 2 threads; one less, for a core to spare: pacos_ray_spare.\n" in text


def test_answers_of_loras_are_not_held_to_those_of_the_base(tmp_path: Path) -> None:
    rates = {"W2": {"pacos_fp32": 300.0, "pacos_bf16": 700.0, "pacos_bf16_32_loras": 500.0}}
    agree = {"W2 pacos_fp32": 1.0, "W2 pacos_bf16": 0.95, "W2 pacos_bf16_32_loras": 0.45}
    text = report_of(tmp_path, generation={"machine": MACHINE, "tokens_per_s": rates, "fp32_first_tokens_agree": agree})
    assert "| pacos_bf16 | 700 | 95.0 % |" in text and "| pacos_bf16_32_loras | 500 | – |" in text


def test_the_readme_claims_what_was_measured() -> None:
    readme = (RESULTS.parents[1] / "README.md").read_text()
    bars = {name: json.loads((RESULTS / f"{name}.json").read_text())["bars"] for name in ("generation", "training")}
    vllm = [bar["measured"] for bar in bars["generation"] if (bar["ours"], bar["peer"]) == ("pacos_bf16", "vllm_bf16")]
    assert f"on two CPU cores {min(vllm):.2f} to {max(vllm):.2f} times its rate in bf16" in readme
    speed = [bar["measured"] for bar in bars["training"] if bar["name"].startswith("tokens/s over")]
    assert f"{max(speed):.0f} times `Trainer`'s tokens a second as it comes, {min(speed):.1f} times once" in readme


def test_numbers_have_three_digits_that_say_something() -> None:
    assert [number(value) for value in (1234.5, 854.49, 56.66, 0.08856, 2.0, 0)] == [
        "1,234",
        "854",
        "56.7",
        "0.0886",
        "2",
        "0",
    ]
