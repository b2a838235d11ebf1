"""`pacos train --dry-run`: what it foretells, against the run."""

import json
import sys
from pathlib import Path

import pytest
import torch

from app import commands
from app.cli import main
from app.config import PrepareConfig, TrainConfig, load_config
from app.data.prepare import prepare
from app.data.shards import read_manifest
from app.display.dry_run import show_forecast
from app.errors import UserError
from app.run_lock import LOCK_FILE
from app.training import dry_run as module
from app.training.dry_run import batch_of, dry_run, shares_of
from app.training.fine_tuning import fine_tune, plan_job
from app.training.loss import as_computed
from app.training.run_log import check_is_new
from app.training.trial import Trial

pytestmark = pytest.mark.ray  # the prepared data needs it; a dry run does not


def config(data: Path, model: Path, output: Path, *overrides: str) -> TrainConfig:
    settings = [f"data={data}", f"model={model}", f"output={output}", "precision=fp32", "workers.cpus=0.5"]
    return load_config(TrainConfig, overrides=[*settings, *overrides])


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> list[module.TrialWork]:
    """Trials that are not run; returns what they would have computed."""
    asked: list[module.TrialWork] = []

    def run_trial(work: module.TrialWork) -> Trial:
        asked.append(work)
        return Trial(process_bytes=500, peak_bytes=10_000_000, step_s=2.0, evaluation_s=1.0)

    monkeypatch.setattr(module, "run_trial", run_trial)
    return asked


@pytest.mark.parametrize(("batch_size", "workers"), [(8, 1), (8, 2), (7, 3)])
def test_shares_are_what_the_feed_deals_out(
    small_data: Path, tiny_model: Path, tmp_path: Path, batch_size: int, workers: int
) -> None:
    job = plan_job(
        config(small_data, tiny_model, tmp_path / "o", f"batch_size={batch_size}", f"workers.count={workers}")
    )
    window = next(job.feed.windows())
    rows = job.feed.read(window)
    shares = iter(shares_of(job, rows))
    dealt = [list(job.feed.batches(packet, workers=workers)) for packet in job.feed.packets(window, workers=workers)]
    for step in range(window.num_steps):
        for worker in range(workers):
            share, batch = next(shares), dealt[worker][step]
            assert share.positions == as_computed(batch, attention="auto").input_ids.numel()
            assert torch.equal(batch_of(job, rows, share).input_ids, batch.input_ids)
            assert torch.equal(batch_of(job, rows, share).loss_mask, batch.loss_mask)
    assert next(shares, None) is None


def test_steps_epochs_tokens_and_time_follow_from_the_data(
    small_data: Path, tiny_model: Path, tmp_path: Path, no_trial: list[module.TrialWork]
) -> None:
    settings = config(
        small_data, tiny_model, tmp_path / "o", "batch_size=8", "epochs=3", "eval_every=20", "save_every=30"
    )
    job = plan_job(settings)
    told = dry_run(job)
    batches = [
        batch
        for window in job.feed.windows()
        for packet in job.feed.packets(window, workers=2)
        for batch in job.feed.batches(packet, workers=2)
    ]
    assert told.steps == job.total_steps == 3 * job.feed.steps_per_epoch
    assert told.epochs == 3
    assert told.tokens == pytest.approx(sum(batch.num_tokens for batch in batches), rel=0.05)
    assert told.loss_tokens == pytest.approx(sum(batch.loss_tokens for batch in batches), rel=0.05)
    assert told.evaluations == 1 + len({*range(20, told.steps + 1, 20), told.steps})
    assert told.checkpoints == len({*range(30, told.steps + 1, 30), told.steps})
    (work,) = no_trial
    assert len(work.batches) == 3
    computed = [as_computed(batch, attention="auto").input_ids.numel() for batch in batches]
    first = as_computed(work.batches[0], attention="auto").input_ids.numel()
    assert first == max(computed[: told.steps])
    assert told.total_s == pytest.approx(
        told.steps * told.step_s + told.evaluations * told.evaluation_s + told.checkpoints * told.checkpoint_s
    )
    crowded = module._crowding(settings)
    typical = as_computed(work.batches[1], attention="auto").input_ids.numel()
    assert told.step_s == pytest.approx(2.0 * crowded * sum(computed) / len(computed) / typical, rel=0.1)


def test_what_the_trial_measured_beyond_arithmetic_is_expected_of_a_worker(
    small_data: Path, tiny_model: Path, tmp_path: Path, no_trial: list[module.TrialWork]
) -> None:
    told = dry_run(plan_job(config(small_data, tiny_model, tmp_path / "o", "max_steps=1")))
    assert told.expected_trial.total == 10_000_000
    assert told.worker.allocator == told.expected_trial.allocator > 0
    assert len(no_trial[0].batches) == 3, "a run of one step is tried thrice"


def test_a_run_that_does_not_fit_is_not_tried_and_says_what_would_help(
    small_data: Path,
    tiny_model: Path,
    tmp_path: Path,
    no_trial: list[module.TrialWork],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "_available_bytes", lambda config: 1_000_000)
    job = plan_job(config(small_data, tiny_model, tmp_path / "o", "batch_size=32", "workers.count=2"))
    commands.run_dry(job, resume=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert no_trial == []
    for remedy in ("micro_batch_size=8", "gradient_checkpointing=true", "deepspeed.zero_stage=2", "no step was tried"):
        assert remedy in shown


def test_mistakes_are_told_as_a_run_would(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    with pytest.raises(UserError, match="is not empty; pass --resume"):
        dry_run(plan_job(config(small_data, tiny_model, tmp_path / "full")))
    begun = tmp_path / "begun"  # killed before its configuration was written: no run that could be resumed
    begun.mkdir()
    for name in ("inputs.sha256", ".config.json.123.tmp", LOCK_FILE):
        (begun / name).write_text("")
    check_is_new(begun)
    (begun / "config.json").write_text("")
    with pytest.raises(UserError, match="is not empty; pass --resume"):
        check_is_new(begun)
    diverging = config(small_data, tiny_model, tmp_path / "o", "optimizer.learning_rate=1e30", "method.type=full")
    with pytest.raises(UserError, match="lower optimizer.learning_rate"):
        dry_run(plan_job(diverging))


@pytest.fixture(scope="session")
def data_of_an_array(
    ray_cluster: None, tiny_model: Path, small_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`small_data`'s records, prepared from one JSON array."""
    folder = tmp_path_factory.mktemp("array")
    (folder / "records.json").write_text(f"[{','.join(small_source.read_text().splitlines())}]")
    made = {"source": str(folder / "records.json"), "output": str(folder / "data"), "model": str(tiny_model)}
    prepare(PrepareConfig.model_validate({**made, "max_length": 96, "validation_fraction": 0.1}))
    return folder / "data"


@pytest.mark.parametrize(("precision", "data"), [("fp32", "small_data"), ("bf16", "data_of_an_array")])
def test_the_run_takes_what_the_dry_run_told(
    precision: str,
    data: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    sizes = ("batch_size=160", "workers.count=1", "max_steps=3", "epochs=3")
    prepared = request.getfixturevalue(data)
    settings = config(prepared, tiny_model, tmp_path / "run", f"precision={precision}", *sizes)
    job = plan_job(settings)
    told = dry_run(job)
    assert not (tmp_path / "run").exists(), "nothing is written"
    assert told.trial is not None and told.total_s is not None and told.total_s > 0
    show_forecast(told)
    shown = " ".join(capsys.readouterr().out.split())
    assert "measured: " in shown and "3 of 160 rows" in shown and "expected time" in shown
    measured = fine_tune(job)["peak_worker_bytes"]
    assert told.worker.total == pytest.approx(measured, rel=0.2)
    assert read_manifest(str(prepared)).num_records("train") == 176
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # Each epoch leaves other rows over: what the first one holds stands for all.
    assert told.tokens == pytest.approx(sum(line.get("tokens", 0) for line in lines), rel=0.01)


def test_the_command_prints_settings_memory_and_time_and_writes_nothing(
    small_data: Path,
    tiny_model: Path,
    tmp_path: Path,
    no_trial: list[module.TrialWork],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def on_ray(*args: object, **options: object) -> None:
        pytest.fail("a dry run needs no Ray")

    monkeypatch.setattr(commands, "on_ray", on_ray)
    settings = [f"data={small_data}", f"model={tiny_model}", f"output={tmp_path / 'run'}", "max_steps=4"]
    monkeypatch.setattr(sys, "argv", ["pacos", "train", "--dry-run", *settings])
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr()
    assert end.value.code == 0, shown.err
    assert len(no_trial) == 1
    for part in ("learning_rate: 0.001", "frozen weights", "activations", "sum", "4 of 16 rows", "expected time"):
        assert part in shown.out
    assert not (tmp_path / "run").exists()
    assert "ray" not in shown.err.lower()


def test_the_option_reaches_the_command(monkeypatch: pytest.MonkeyPatch, small_data: Path, tmp_path: Path) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(commands, "train", lambda config, **options: asked.append(options["dry_run"]))
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry-run", f"data={small_data}", f"output={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        main("train")
    assert end.value.code == 0 and asked == [True]
