"""Sweeps on the session's Ray cluster."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from app.config import EvaluateConfig, PromoteBestConfig, SweepConfig, TrackingConfig
from app.errors import UserError
from app.training.checkpoint_store import CheckpointStore
from app.training.evaluate import evaluate, plan_evaluation
from app.training.fine_tuning import fine_tune, plan_job
from tune.commands import promote_best
from tune.driver import Budget
from tune.plan import plan_sweep
from tune.records import ERROR_FILE, TrialRecord, read_records
from tune.sweep import sweep

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
REPOSITORY = Path(__file__).parents[2]
SweepOf = Callable[..., SweepConfig]


def run(config: SweepConfig, **options: Any) -> tuple[Any, list[TrialRecord]]:
    results = sweep(config, plan_sweep(config), **options)
    return results, read_records(Path(config.output))


def processes(name: str) -> list[psutil.Process]:
    """Those of Ray that are called so; never another job's on this machine."""
    return [process for process in psutil.Process().children(recursive=True) if name in _command_line(process)]


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # gone since
        return ""


def test_packed_trials_and_runs_of_their_own_are_ranked_together(
    ray_cluster: None, sweep_of: SweepOf, tmp_path: Path, tracking_store: str
) -> None:
    config = sweep_of(
        space=[
            {"method.type": "lora", "method.rank": [1, 4]},
            {"method.type": "prefix", "method.length": 3},
            {"method.type": "bitfit"},
        ],
        tracking={"experiment": "sweep-test"},
    )
    results, trials = run(config)
    assert [trial.state for trial in trials] == ["finished"] * 4, [trial.error for trial in trials]
    assert all(trial.step == 8 for trial in trials)
    assert [trial.loss for trial in results.ranking] == sorted(trial.loss for trial in trials)
    assert all((Path(trial.config.output) / "delta/delta.safetensors").exists() for trial in trials)
    assert json.loads((Path(config.output) / "best.json").read_text())["trial"] == results.ranking[0].number

    # A packed trial is what `pacos train` makes of the same settings.
    packed = trials[1]
    alone = packed.config.model_copy(update={"output": str(tmp_path / "alone"), "tracking": TrackingConfig(uri="none")})
    rows: list[dict[str, Any]] = []
    fine_tune(plan_job(alone), on_metrics=rows.append)
    assert [row["loss"] for row in rows[1:]] == pytest.approx([row["loss"] for row in packed.rows[1:]], abs=1e-4)
    assert rows[-1]["eval_loss"] == pytest.approx(packed.loss, abs=1e-4)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_store)
    experiment = client.get_experiment_by_name("sweep-test")
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags and run.info.status == "FINISHED"]
    assert len(parents) == 1 and len(children) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}

    promote_best(PromoteBestConfig(best=config.output, name="sweep-winner"))
    version = client.get_model_version_by_alias("sweep-winner", "production")
    assert float(version.tags["eval_loss"]) == pytest.approx(results.ranking[0].loss, abs=1e-4)


def test_the_scheduler_stops_trials_and_others_take_their_places(ray_cluster: None, sweep_of: SweepOf) -> None:
    config = sweep_of(
        # Rates so small that nothing is learned, behind one that learns.
        space={"method.rank": 2, "optimizer.learning_rate": [1e-2, 1e-9, 2e-9, 3e-9, 4e-9, 5e-9]},
        scheduler={"type": "asha", "first_steps": 2, "factor": 2},
        train={"workers": {"cpus": 4, "threads": 1}},
        pack_size=2,
    )
    results, trials = run(config)
    assert {trial.state for trial in trials} == {"finished", "stopped"}
    assert len(trials) == 6 and results.count("stopped") >= 2
    assert all(trial.step < 8 for trial in trials if trial.state == "stopped")


def test_a_pack_that_is_killed_costs_no_trial(ray_cluster: None, sweep_of: SweepOf) -> None:
    killed: list[int] = []

    def kill_one_pack(record: TrialRecord) -> None:
        if not killed:
            process = processes("_PackActor")[0]
            killed.append(process.pid)
            process.kill()

    config = sweep_of(
        space={"method.rank": [1, 2, 3, 4], "max_steps": [4, 40]},
        train={"eval_every": 4, "max_steps": 40, "workers": {"cpus": 4, "threads": 1}},
        pack_size=3,
    )
    results, trials = run(config, on_end=kill_one_pack)
    assert killed
    assert [trial.state for trial in trials] == ["finished"] * 8, [trial.error for trial in trials]
    assert all([row["step"] for row in trial.rows] == list(range(trial.step + 1)) for trial in trials)


@contextmanager
def killed_as_it_trains(name: str, sweep: Path) -> Iterator[list[tuple[TrialRecord, int]]]:
    """For the time of a sweep that has room for one run at once: the first trial that has gone on from step 10, which
    is saved, loses its process `name`. Yields that trial, as it was before, and the step that it had saved last."""
    found: list[tuple[TrialRecord, int]] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.02):
            for trial in read_records(sweep):
                saved = CheckpointStore(Path(trial.config.output) / "checkpoints")
                if trial.step > 10 <= saved.latest_step():
                    victims = processes(name)
                    for process in victims:
                        process.kill()
                    psutil.wait_procs(victims)
                    found.append((trial, saved.latest_step()))
                    return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize(
    ("name", "max_failures"),
    [("RayTrainWorker", 0), ("ImplicitFunc", 2)],
    ids=["worker_that_trains", "process_of_the_trial"],
)
def test_a_run_of_its_own_that_loses_a_process_goes_on_from_its_checkpoint_and_the_sweep_with_it(
    ray_cluster: None, sweep_of: SweepOf, name: str, max_failures: int
) -> None:
    config = sweep_of(
        space={"method.rank": [1, 2]},
        pack="never",
        train={
            "epochs": 10,
            "max_steps": 100,
            "eval_every": 50,
            "save_every": 10,
            "max_failures": max_failures,
            "workers": {"cpus": 4, "threads": 1},
        },
        tracking={"uri": "none"},
    )
    with killed_as_it_trains(name, Path(config.output)) as killed:
        _, trials = run(config)
    assert [trial.state for trial in trials] == ["finished"] * 2, [trial.error for trial in trials]
    assert all([row["step"] for row in trial.rows] == list(range(101)) for trial in trials)
    ((before, saved),) = killed
    assert before.state == "running" and saved < 100
    # The rows say how long each step took: those that were saved were not made again.
    assert trials[before.number].rows[:11] == before.rows[:11]
    assert (before.folder / ERROR_FILE).exists() == (max_failures == 0)


def test_a_trial_that_fails_again_is_reported_and_the_others_go_on(ray_cluster: None, sweep_of: SweepOf) -> None:
    config = sweep_of(
        space={"optimizer.learning_rate": [1e-2, 1e30], "optimizer.clip_norm": 1e30}, train={"method": {"type": "lora"}}
    )
    results, trials = run(config)
    assert [trial.state for trial in trials] == ["finished", "failed"]
    assert "lower optimizer.learning_rate" in (trials[1].error or "")
    assert results.best is not None and results.best.number == 0


def test_the_best_are_trained_again_with_other_seeds_and_the_winner_is_tested_once(
    ray_cluster: None, sweep_of: SweepOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep_of(
        space=[{"method.type": "lora", "method.rank": [1, 2]}, {"method.type": "bitfit"}],
        finals={"trials": 2, "seeds": 2},
        train={"max_steps": 4},
        tracking={"uri": "none"},
    )
    ends: list[TrialRecord] = []
    warnings: list[str] = []
    with monkeypatch.context() as patch:  # a budget that is spent with the search
        patch.setattr(Budget, "spent", lambda budget: "budget.hours=1" if len(ends) == 3 else None)
        results, trials = run(config, on_end=ends.append, warn=warnings.append)
    assert [trial.state for trial in trials] == ["finished"] * 3, [trial.error for trial in trials]
    assert results.best is results.ranking[0] and not results.finalists
    assert not (Path(config.output) / "test.json").exists()
    assert "budget.hours=1 was spent before the finals were over" in warnings[0]

    results, trials = run(config, resume=True)
    assert [trial.state for trial in trials] == ["finished"] * 7, [trial.error for trial in trials]
    assert all(trial.step == 4 for trial in trials)
    assert {finalist.trial.method for finalist in results.finalists} == {"lora", "bitfit"}
    assert all(finalist.deviation > 0 for finalist in results.finalists)
    assert results.best is results.finalists[0].run
    best = json.loads((Path(config.output) / "best.json").read_text())
    assert best["test"]["trial"] == best["trial"] and best["test"]["records"] == 12

    plan = EvaluateConfig(
        data=results.best.config.data, model=results.best.config.model, delta=best["run"] + "/delta", split="test",
        answers=0, workers={"count": 1},
    )  # fmt: skip
    assert evaluate(plan_evaluation(plan))[0].loss == pytest.approx(best["test"]["loss"], abs=1e-5)

    file = Path(config.output) / "test.json"
    written = [path.stat().st_mtime_ns for path in (file, *(Path(t.config.output) / "result.json" for t in trials))]
    again, same = run(config, resume=True)
    assert written == [
        path.stat().st_mtime_ns for path in (file, *(Path(t.config.output) / "result.json" for t in same))
    ]
    assert again.best is not None and again.best.number == results.best.number


def killed_once(config: SweepConfig, file: Path, is_far_enough: Callable[[], bool]) -> None:
    """A driver of its own process, killed with all its threads as soon as the sweep has come so far."""
    import ray

    file.write_text(config.model_dump_json())
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "tune.sweep", "--config", str(file), "--address", address]
    driver = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, env={**os.environ, "PYTHONPATH": "."})
    try:
        deadline = time.monotonic() + 120
        while not is_far_enough():
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def test_a_sweep_whose_driver_was_killed_goes_on_and_runs_no_finished_trial_again(
    ray_cluster: None, sweep_of: SweepOf, tmp_path: Path
) -> None:
    config = sweep_of(
        space={"method.rank": [1, 2, 3, 4, 5, 6]},
        train={"epochs": 2, "max_steps": 30, "eval_every": 5, "save_every": 5, "workers": {"cpus": 4, "threads": 1}},
        pack_size=2,
        tracking={"uri": "none"},
    )
    with pytest.raises(UserError, match="holds no sweep to resume"):
        run(config, resume=True)
    output = Path(config.output)
    killed_once(config, tmp_path / "sweep.json", lambda: any(t.state == "finished" for t in read_records(output)))
    before = {trial.number: trial for trial in read_records(Path(config.output)) if trial.state == "finished"}
    written = {n: (Path(trial.config.output) / "result.json").stat().st_mtime_ns for n, trial in before.items()}
    assert 0 < len(before) < 6
    with pytest.raises(UserError, match="is not empty"):
        run(config)
    with pytest.raises(UserError, match="space: the sweep was started with"):
        run(sweep_of(space={"method.rank": [1, 2]}, train=config.train), resume=True)
    results, trials = run(config, resume=True)
    assert [trial.state for trial in trials] == ["finished"] * 6, [trial.error for trial in trials]
    assert written == {n: (Path(trials[n].config.output) / "result.json").stat().st_mtime_ns for n in before}
    for trial in trials:
        assert [row["step"] for row in trial.rows] == list(range(31)), trial.folder


def population(sweep_of: SweepOf, **settings: Any) -> SweepConfig:
    return sweep_of(
        search={"type": "random", "seed": 1},
        scheduler={"type": "population", "mutate": ["optimizer.learning_rate"], "every": 2},
        **settings,
    )


def check_winner(results: Any, tmp_path: Path) -> None:
    """What an exchange has found is a setting, and so `pacos train` computes it again from the beginning."""
    best = results.best
    assert best is not None and best.config.changes
    again = best.config.model_copy(update={"output": str(tmp_path / "again"), "tracking": TrackingConfig(uri="none")})
    rows: list[dict[str, Any]] = []
    fine_tune(plan_job(again), on_metrics=rows.append)
    assert [row["step"] for row in best.rows] == [row["step"] for row in rows]
    assert [row["loss"] for row in rows[1:]] == pytest.approx([row["loss"] for row in best.rows[1:]], abs=1e-4)
    assert rows[-1]["eval_loss"] == pytest.approx(best.loss, abs=1e-4)


def test_a_population_exchanges_and_its_winner_is_a_run_that_can_be_trained_again(
    ray_cluster: None, sweep_of: SweepOf, tmp_path: Path, tracking_store: str
) -> None:
    config = population(
        sweep_of,
        space={"optimizer.learning_rate": {"log_uniform": [1e-5, 1e-2]}, "method.rank": [2, 3]},
        budget={"trials": 4},
        finals={"trials": 1, "seeds": 2},
        train={"optimizer": {"schedule": "constant"}},
        tracking={"experiment": "population-test"},
    )
    results, trials = run(config)
    assert [trial.state for trial in trials] == ["finished"] * 6, [trial.error for trial in trials]
    assert all([row["step"] for row in trial.rows] == list(range(9)) for trial in trials)
    assert len(list(Path(config.output).glob("exchanges/*.json"))) == 3  # after 2, 4 and 6 of 8 steps
    searched, finals = trials[:4], trials[4:]
    changed = [trial for trial in searched if trial.lineage]
    assert changed and all(trial.config.changes for trial in changed)
    assert all(run.config.changes == trials[run.repeats or 0].config.changes for run in finals)
    if not trials[finals[0].repeats or 0].config.changes:  # the best took over nobody: then one that did
        results = SimpleNamespace(best=min(changed, key=lambda trial: trial.loss or 0))
    check_winner(results, tmp_path)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_store)
    experiment = client.get_experiment_by_name("population-test")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    trial = changed[0]
    tracked = found[trial.config.tracking.run_name or ""]
    assert json.loads(tracked.data.params["changes"])[-1]["after"] == trial.lineage[-1][1]
    history = client.get_metric_history(tracked.info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, 9))


def test_a_population_of_runs_of_their_own_exchanges_by_checkpoints(
    ray_cluster: None, sweep_of: SweepOf, tmp_path: Path
) -> None:
    config = population(
        sweep_of,
        space={"method.type": "bitfit", "optimizer.learning_rate": {"log_uniform": [1e-5, 1e-2]}},
        budget={"trials": 2},
        train={"max_steps": 4, "save_every": 100, "optimizer": {"schedule": "constant"}},
        tracking={"uri": "none"},
    )
    results, trials = run(config)
    assert [trial.state for trial in trials] == ["finished"] * 2, [trial.error for trial in trials]
    assert [len(trial.lineage) for trial in trials].count(1) == 1
    results = SimpleNamespace(best=next(trial for trial in trials if trial.lineage))
    check_winner(results, tmp_path)


def test_a_population_whose_driver_was_killed_goes_on_with_what_was_exchanged(
    ray_cluster: None, sweep_of: SweepOf, tmp_path: Path
) -> None:
    config = population(
        sweep_of,
        space={"optimizer.learning_rate": {"log_uniform": [1e-5, 1e-2]}},
        budget={"trials": 4},
        train={"epochs": 2, "max_steps": 30, "save_every": 5, "workers": {"cpus": 4, "threads": 1}},
        tracking={"uri": "none"},
    )
    exchanges = Path(config.output) / "exchanges"
    killed_once(config, tmp_path / "sweep.json", lambda: len(list(exchanges.glob("*.json"))) > 3)
    decided = {file.name: file.read_text() for file in exchanges.glob("*.json")}
    assert all(trial.state == "running" for trial in read_records(Path(config.output)))
    _, trials = run(config, resume=True)
    assert [trial.state for trial in trials] == ["finished"] * 4, [trial.error for trial in trials]
    assert all([row["step"] for row in trial.rows] == list(range(31)) for trial in trials)
    assert {name: (exchanges / name).read_text() for name in decided} == decided
    assert len(list(exchanges.glob("*.json"))) == 14


def test_trials_are_shared_out_over_as_many_packs_as_there_is_room_for_and_rank_as_in_one(
    ray_cluster: None, sweep_of: SweepOf, tmp_path: Path
) -> None:
    """Six CPUs hold two packs of two beside the trials' processes; four trials take turns, one to a pack."""
    settings: dict[str, Any] = {"space": {"method.rank": [1, 2, 3, 4]}, "tracking": {"uri": "none"}}
    place = tmp_path / "password=hunter2"  # nobody may read this in the sweep's folder
    config = sweep_of(**settings, pack_size=1, train={"checkpoints": str(place)})
    seen: set[int] = set()
    ends: list[TrialRecord] = []

    def count_packs(record: TrialRecord) -> None:
        ends.append(record)
        seen.update(process.pid for process in processes("_PackActor"))

    results, trials = run(config, on_end=count_packs)
    assert len(seen) == 2 and len(ends) == 4
    assert [trial.state for trial in trials] == ["finished"] * 4, [trial.error for trial in trials]
    assert sorted(path.name for path in place.glob("*/run/*")) == ["step-00000008"] * 4
    files = [path for path in Path(config.output).rglob("*") if path.is_file()]
    assert len(files) > 40 and not any(b"hunter2" in path.read_bytes() for path in files)
    one, _ = run(sweep_of(**settings, output=str(tmp_path / "one")))
    assert [trial.number for trial in one.ranking] == [trial.number for trial in results.ranking]
    assert [t.loss for t in one.ranking] == pytest.approx([t.loss for t in results.ranking], abs=1e-4)
