"""`pacos train` on the session's Ray cluster: two workers, DeepSpeed, gloo."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from app.config import EvaluateConfig, PrepareConfig, PromoteConfig, TrainConfig, load_config
from app.data.prepare import prepare
from app.data.shards import read_manifest
from app.errors import Interrupted, UserError
from app.methods.delta import apply_delta, read_delta
from app.models.checkpoints import load_decoder, save_decoder
from app.models.decoder import Decoder
from app.ray_cluster import dashboard_url
from app.run_lock import locked
from app.tracking.registry import fetch, list_versions, promote
from app.tracking.store import open_store
from app.training import loop
from app.training.checkpointing import CHECKPOINT_FILES, read_checkpoint
from app.training.deepspeed import WHOLE_BELOW
from app.training.evaluate import evaluate, plan_evaluation, write_evaluations
from app.training.fine_tuning import Job, fine_tune, loop_plan, plan_job, set_up, validation_batches
from app.training.interruption import ONE_WISH_S
from app.training.loop import Metrics
from app.training.optimizer import PlainOptimizer

pytestmark = pytest.mark.ray

STEPS = 8
INTERRUPT_HANDLER = signal.getsignal(signal.SIGINT)


def config(data: Path, model: Path, output: Path, *overrides: str) -> TrainConfig:
    settings = [
        f"data={data}",
        f"model={model}",
        f"output={output}",
        "batch_size=8",
        f"max_steps={STEPS}",
        "eval_every=4",
        "save_every=3",
        "precision=fp32",
        "method.rank=4",
        "method.dropout=0.1",
        "optimizer.learning_rate=1e-2",
        "workers.cpus=0.5",
    ]
    return load_config(TrainConfig, overrides=[*settings, *overrides])


def train(settings: TrainConfig, *, resume: bool = False) -> tuple[dict, list[Metrics]]:
    seen: list[Metrics] = []
    return fine_tune(plan_job(settings), resume=resume, on_metrics=seen.append), seen


def losses(metrics: list[Metrics]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics if "loss" in row}


def in_a_plain_process(job: Job) -> list[Metrics]:
    """What the loop alone makes of `job`, here: no Ray, no DeepSpeed, no other worker."""
    model = load_decoder(Path(job.config.model))
    torch.manual_seed(job.config.seed)
    set_up(model, job.config)
    packets = (packet for window in job.feed.windows() for packet in job.feed.packets(window, workers=1))
    seen: list[Metrics] = []
    loop.run(
        model,
        PlainOptimizer(model, job.config.optimizer),
        plan=loop_plan(job, workers=1),
        start_step=0,
        batches=(batch for packet in packets for batch in job.feed.batches(packet, workers=1)),
        validation=lambda: validation_batches(job),
        report=seen.append,
        save=lambda step, metrics: None,
    )
    return seen


@pytest.fixture(scope="module")
def unbroken(small_data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """One whole run, which the others are compared with."""
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    recorded = ["tracking.experiment=unbroken", "register_as=unbroken", "workers.price_per_hour=3.6", "samples=2"]
    summary, seen = train(config(small_data, tiny_model, output, *recorded))
    return output, summary, seen


def test_a_run_lowers_the_loss_and_leaves_all_its_files(unbroken) -> None:
    output, summary, seen = unbroken
    assert signal.getsignal(signal.SIGINT) is INTERRUPT_HANDLER, "Ctrl-C is ours again"
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert list(losses(seen)) == list(range(1, STEPS + 1))
    assert [row["step"] for row in seen if "eval_loss" in row] == [0, 4, 8]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines == seen
    assert json.loads((output / "config.json").read_text())["method"]["rank"] == 4
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "result.json").read_text()) == summary


def test_two_workers_make_one_mlflow_run_with_everything_in_it(unbroken, tracking_store: str) -> None:
    output, summary, seen = unbroken
    client = open_store(tracking_store)
    experiment = client.get_experiment_by_name("unbroken")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == summary["mlflow_run"] == json.loads((output / "mlflow.json").read_text())["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.params["method.rank"] == "4" and run.data.params["workers.count"] == "2"
    losses_there = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "loss")}
    assert losses_there == pytest.approx(losses(seen))
    assert run.data.metrics["cost"] == pytest.approx(summary["cost"])
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert kept >= {"config.json", "loss.png", "report.html", "result.json", "delta"}


def test_a_registered_run_is_served_once_it_is_promoted(unbroken, tracking_store: str) -> None:
    assert unbroken[1]["registered"] == "unbroken/1"
    promote(PromoteConfig(name="unbroken", version=1))
    served = fetch("models:/unbroken@production", uri="auto")
    assert read_delta(served).hash == read_delta(unbroken[0] / "delta").hash
    assert served != unbroken[0] / "delta"
    (version,) = [version for version in list_versions("auto") if version.name == "unbroken"]
    assert float(version.tags["eval_loss"]) == pytest.approx(unbroken[1]["eval_loss_after"], rel=1e-4)


def test_the_summary_says_what_the_run_cost(unbroken) -> None:
    _, summary, seen = unbroken
    assert summary["tokens"] == sum(row.get("tokens", 0) for row in seen) > 0
    spent_s = sum(row.get("step_s", 0) for row in seen)
    assert summary["worker_hours"] * 3600 > 2 * spent_s, "both workers, from their start"
    assert summary["cost"] == pytest.approx(3.6 * summary["worker_hours"])
    assert summary["cost_per_million_tokens"] == pytest.approx(summary["cost"] / summary["tokens"] * 1e6)


def test_the_report_shows_answers_before_and_after_and_the_memory_of_each_worker(unbroken) -> None:
    output, summary, seen = unbroken
    samples = json.loads((output / "samples.json").read_text())
    assert len(samples) == 2
    assert all(sample["prompt"].startswith("Instruction:") and sample["reference"] for sample in samples)
    assert any(sample["before"] != sample["after"] for sample in samples)
    evaluations = [row for row in seen if "eval_loss" in row]
    assert all(len(row["worker_bytes"]) == 2 and min(row["worker_bytes"]) > 2**20 for row in evaluations)
    page = (output / "report.html").read_text()
    assert page.count("<img src='data:image/png;base64,") == 6
    assert "http" not in page.replace(f"{summary['mlflow_run']}", ""), "it is self-contained"
    for text in (f"{summary['eval_loss_after']:.3f}", "unbroken/1", "optimizer.learning_rate", "cost per million"):
        assert text in page


def test_the_dashboards_train_tab_shows_the_run(unbroken) -> None:
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    headers = get_auth_headers_if_auth_enabled({})
    response = httpx.get(f"{dashboard_url()}/api/train/v2/runs/v1", headers=headers, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    runs = response.json()["train_runs"]
    (run,) = [run for run in runs if run["name"].startswith("unbroken-")]
    assert run["status"] == "FINISHED"
    assert len(run["attempts"][-1]["workers"]) == 2


@torch.no_grad()
def test_the_delta_reproduces_the_held_out_loss(unbroken, small_data: Path, tiny_model: Path) -> None:
    output, summary, _ = unbroken
    delta = read_delta(output / "delta")
    assert delta.metadata["template"] == {"type": "pacos"}
    apply_delta(load_decoder(tiny_model), delta)
    settings = EvaluateConfig(
        data=str(small_data),
        model=str(tiny_model),
        delta=str(output / "delta"),
        samples=2,
        output=str(output / "evaluation.json"),
        workers=config(small_data, tiny_model, output).workers.fixed,
    )
    (result,) = evaluate(plan_evaluation(settings))
    write_evaluations(settings, [result])
    assert result.loss == pytest.approx(summary["eval_loss_after"], rel=1e-5)
    assert len(result.samples) == 2
    assert all(sample.prompt.startswith("Instruction:") for sample in result.samples)
    assert json.loads((output / "evaluation.json").read_text())["results"][0]["loss"] == result.loss


def training_workers() -> list[psutil.Process]:
    ours = psutil.Process().children(recursive=True)  # never those of another job on this machine
    return [process for process in ours if "RayTrainWorker" in " ".join(_command_line(process))]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # gone since
        return []


def long_config(data: Path, model: Path, output: Path, *overrides: str) -> TrainConfig:
    return config(data, model, output, "max_steps=80", "epochs=8", "save_every=10", "eval_every=40", *overrides)


@pytest.fixture(scope="module")
def killed(small_data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Metrics]]:
    """A run of which a worker was killed, in the middle of a step after the twelfth."""
    output = tmp_path_factory.mktemp("runs") / "killed"
    seen: list[Metrics] = []
    killed: list[int] = []

    def kill_after_step_12(metrics: Metrics) -> None:
        seen.append(metrics)
        if metrics["step"] >= 12 and not killed:
            worker = training_workers()[0]
            killed.append(worker.pid)
            worker.kill()

    fine_tune(plan_job(long_config(small_data, tiny_model, output)), on_metrics=kill_after_step_12)
    assert killed
    return output, seen


@pytest.mark.chaos
def test_a_killed_worker_is_replaced_and_the_losses_continue(killed: tuple[Path, list[Metrics]]) -> None:
    output, seen = killed
    steps = [row["step"] for row in seen if "loss" in row]
    assert sorted(set(steps)) == list(range(1, 81))
    again = [step for step in set(steps) if steps.count(step) > 1]
    assert len(again) <= 10, "what a crash costs is at most the steps since the last checkpoint"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == list(range(81))
    for step in again:
        first, second = [row["loss"] for row in seen if row["step"] == step]
        assert second == pytest.approx(first, abs=1e-5)


@pytest.mark.chaos
def test_ctrl_c_saves_the_step_that_runs_and_the_losses_continue(
    killed: tuple[Path, list[Metrics]], small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings = long_config(small_data, tiny_model, tmp_path / "run", "save_every=80")
    job, before = plan_job(settings), []

    def interrupt_after_step_5(metrics: Metrics) -> None:
        before.append(metrics)
        if metrics["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match=r"stopped after step \d+ of 80, which is saved; --resume goes on") as stopped:
        fine_tune(job, on_metrics=interrupt_after_step_5)
    assert signal.getsignal(signal.SIGINT) is INTERRUPT_HANDLER, "Ctrl-C is ours again"
    last = max(losses(before))
    assert f"after step {last} of" in str(stopped.value) and job.checkpoints.steps() == [last]
    assert not (tmp_path / "run/delta").exists()
    _, after = train(settings, resume=True)
    assert list(losses(after)) == list(range(last + 1, 81))
    whole = losses(killed[1])
    for step, loss in {**losses(before), **losses(after)}.items():
        assert loss == pytest.approx(whole[step], abs=1e-4)


def test_a_second_ctrl_c_ends_at_once_and_leaves_no_worker(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    def interrupt_twice(metrics: Metrics) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(1.2 * ONE_WISH_S)
        signal.raise_signal(signal.SIGINT)

    job = plan_job(long_config(small_data, tiny_model, tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt) as ended:
        fine_tune(job, on_metrics=interrupt_twice)
    assert not isinstance(ended.value, Interrupted)
    deadline = time.monotonic() + 60
    while training_workers():
        assert time.monotonic() < deadline, "the workers are there still"
        time.sleep(0.5)


def test_checkpoints_hold_trained_weights_and_where_the_run_stands(unbroken) -> None:
    output, summary, seen = unbroken
    folders = sorted((output / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000006", "step-00000008"]
    for folder, step in zip(folders, (6, 8), strict=True):
        assert {file.name for file in folder.iterdir()} == set(CHECKPOINT_FILES), "safetensors and JSON, no pickle"
        trained_bytes = 4 * summary["trained_parameters"]
        sizes = [(folder / name).stat().st_size for name in ("weights.safetensors", "moments.safetensors")]
        assert trained_bytes <= sizes[0] <= trained_bytes + 4096, "no frozen weight"
        assert 2 * trained_bytes <= sizes[1] <= 2 * trained_bytes + 8192
        checkpoint = read_checkpoint(folder)
        assert all(tensor.numel() for tensor in (checkpoint.weights | checkpoint.moments).values())
        (row,) = (row for row in seen if row["step"] == step)
        state = checkpoint.state
        assert (state["epoch"], state["rows"], state["seed"], state["workers"]) == (0, 8 * step, 0, 2)
        assert state["unwritten"][-1] == row, "the driver may be killed before it writes it down"
        assert state["metrics"]["loss"] == row["loss"] and state["metrics"]["learning_rate"] == row["learning_rate"]


@pytest.fixture(scope="module")
def packed(small_source: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """All weights trained on packed rows, by two workers; then stopped after step 3 and resumed by three, without ZeRO.

    Stopped by taking the later checkpoint away, as a kill before it would leave it.
    """
    folder = tmp_path_factory.mktemp("packed")
    data, output = folder / "data", folder / "run"
    made = {"source": str(small_source), "output": str(data), "model": str(tiny_model), "max_length": 96}
    prepare(PrepareConfig.model_validate({**made, "layout": {"type": "packed", "length": 384}}))
    settings = [
        f"data={data}", f"model={tiny_model}", f"output={output}", "method.type=full", "batch_size=8", "epochs=4",
        "max_steps=6", "eval_every=4", "save_every=3", "precision=fp32", "workers.cpus=0.5", "samples=2",
        "optimizer.learning_rate=3e-3", "deepspeed.zero_stage=2",
    ]  # fmt: skip
    whole = train(load_config(TrainConfig, overrides=settings))
    shutil.copytree(output / "model", folder / "whole")
    shutil.rmtree(output / "checkpoints/step-00000006")
    shutil.rmtree(output / "model")
    changes = ["workers.count=3", "deepspeed.zero_stage=0"]
    resumed = train(load_config(TrainConfig, overrides=[*settings, *changes]), resume=True)
    return data, folder / "whole", output, whole, resumed


def test_zero_3_trains_through_ray_as_a_plain_process_does(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"  # the tiny model's matrices are too small for ZeRO-3 to be cut
    shutil.copytree(tiny_model, wide)
    shape = replace(load_decoder(tiny_model).config, width=512)
    model = Decoder(shape)
    model.initialize(generator=torch.Generator().manual_seed(0))
    save_decoder(wide, model)
    assert sum(parameter.numel() > WHOLE_BELOW for parameter in model.parameters()) > 1
    changes = ["deepspeed.zero_stage=3", "max_steps=4", "micro_batch_size=2", "samples=0", "workers.count=2"]
    changes += ["optimizer.learning_rate=1e-3", "method.dropout=0"]
    settings = config(small_data, wide, tmp_path / "run", *changes)
    plain = in_a_plain_process(plan_job(settings))
    summary, metrics = train(settings)
    assert losses(metrics) == pytest.approx(losses(plain), rel=1e-5) and len(losses(metrics)) == 4
    assert summary["eval_loss_after"] == pytest.approx(plain[-1]["eval_loss"], rel=1e-5)


def test_packed_rows_lower_the_loss_through_an_epochs_end(packed, tiny_model: Path, tmp_path: Path) -> None:
    data, _, _, (summary, _), _ = packed
    assert plan_job(config(data, tiny_model, tmp_path)).feed.steps_per_epoch < 6
    assert summary["eval_loss_after"] < summary["eval_loss_before"]


def test_full_fine_tuning_leaves_a_whole_model(packed, tiny_model: Path) -> None:
    _, model, _, (summary, _), _ = packed
    assert summary["trained_parameters"] == sum(p.numel() for p in load_decoder(tiny_model).parameters())
    assert (model / "tokenizer.json").exists()
    changed = load_decoder(model).state_dict()
    assert all(not torch.equal(changed[name], w) for name, w in load_decoder(tiny_model).state_dict().items())


def test_a_stopped_run_resumes_with_another_number_of_workers_and_zero_stage(packed) -> None:
    _, _, output, (whole, before), (resumed, after) = packed
    assert list(losses(after)) == [4, 5, 6]
    for step, loss in losses(after).items():
        assert loss == pytest.approx(losses(before)[step], abs=1e-4), "the same rows"
    assert resumed["eval_loss_after"] == pytest.approx(whole["eval_loss_after"], abs=1e-4)
    assert (output / "model/tokenizer.json").exists()
    assert resumed["mlflow_run"] == whole["mlflow_run"], "it goes on in the same run"
    assert resumed["worker_hours"] > whole["worker_hours"], "the hours of both sessions"


def test_the_samples_of_packed_rows_are_one_record_each(packed, tiny_model: Path) -> None:
    data = packed[0]
    on_training_rows = EvaluateConfig(
        data=str(data), model=str(tiny_model), split="train", samples=3, workers={"cpus": 0.5}
    )
    (seen_by_evaluate,) = evaluate(plan_evaluation(on_training_rows))
    assert seen_by_evaluate.records == read_manifest(str(data)).num_records("train")
    for sample in seen_by_evaluate.samples:
        assert sample.prompt.count("Instruction:") == 1 and sample.prompt.endswith("Response:")
        assert "Instruction:" not in sample.reference


@pytest.mark.chaos
def test_a_store_that_goes_away_ends_the_run_at_once_and_the_run_goes_on_when_it_is_back(
    s3, small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Rank 0 alone fails, while the other worker waits for it; Ray would start the workers again."""
    place = f"checkpoints={s3.uri('run')}"
    settings = long_config(small_data, tiny_model, tmp_path / "run", place, "workers.count=[1,2]")
    seen: list[Metrics] = []

    def stop_server_after_step_15(metrics: Metrics) -> None:
        seen.append(metrics)
        if metrics["step"] == 15:
            s3.stop()

    job = plan_job(settings)
    with pytest.raises(UserError, match="cannot be .* in 's3://bucket/run"):
        fine_tune(job, on_metrics=stop_server_after_step_15)
    assert len(losses(seen)) == len([row for row in seen if "loss" in row]), "no step came twice"
    s3.start()
    kept = job.checkpoints.latest_step()
    assert kept in (10, 20, 30)
    _, after = train(settings, resume=True)
    assert list(losses(after)) == list(range(kept + 1, 81))
    assert 80 in job.checkpoints.steps() and not (tmp_path / "run/checkpoints").exists()


def test_a_finished_run_that_is_resumed_keeps_what_its_delta_says_of_it(
    unbroken, small_data: Path, tiny_model: Path
) -> None:
    delta = unbroken[0] / "delta/delta.json"
    before = json.loads(delta.read_text())["metrics"]
    assert before["eval_loss"] > 0 and before["step"] == 8
    train(config(small_data, tiny_model, unbroken[0], "samples=2", "workers.count=1"), resume=True)
    assert json.loads(delta.read_text())["metrics"] == before


def test_a_run_folder_is_not_overwritten_and_a_resumed_run_not_changed(
    unbroken, small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="pass --resume"):
        train(config(small_data, tiny_model, unbroken[0], "samples=2"))
    with pytest.raises(UserError, match="holds step 8 of another run"):
        train(config(small_data, tiny_model, tmp_path / "other", f"checkpoints={unbroken[0] / 'checkpoints'}"))
    with pytest.raises(UserError, match="holds no checkpoint; the run's were elsewhere"):
        elsewhere = f"checkpoints={tmp_path / 'empty'}"
        train(config(small_data, tiny_model, unbroken[0], elsewhere, "samples=2"), resume=True)
    with locked(unbroken[0]), pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"):
        train(config(small_data, tiny_model, unbroken[0]), resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        train(config(small_data, tiny_model, tmp_path / "new"), resume=True)
    (unbroken[0] / "inputs.sha256").write_text("other\n")
    with pytest.raises(UserError, match="has changed since it was started"):
        train(config(small_data, tiny_model, unbroken[0], "samples=2"), resume=True)
    with pytest.raises(UserError, match="batch_size: the run was started with 8, not 4"):
        train(config(small_data, tiny_model, unbroken[0], "batch_size=4", "samples=2"), resume=True)


def test_what_does_not_fit_together_is_told_before_anything_starts(
    small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no manifest.json"):
        plan_job(config(tmp_path, tiny_model, tmp_path / "o"))
    with pytest.raises(UserError, match="batch_size=1000 is more than"):
        plan_job(config(small_data, tiny_model, tmp_path / "o", "batch_size=1000"))
    with pytest.raises(UserError, match="matches no layer"):
        plan_job(config(small_data, tiny_model, tmp_path / "o", "method.targets=[q_proj]"))
    with pytest.raises(UserError, match="no such folder"):
        plan_job(config(small_data, tmp_path / "absent", tmp_path / "o"))
