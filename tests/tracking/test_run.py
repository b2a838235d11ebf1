"""The MLflow run of a job, on SQLite and over HTTP with MLflow's own server."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow_process import mlflow_server

from app.config import TrackingConfig, TrainConfig, load_config
from app.errors import UserError, masked
from app.tracking.run import RUN_FILE, TrackedRun, check_tracking, flattened, open_tracker, tracked_run
from app.tracking.store import open_store, tracking_uri


def tracked(uri: str, output: Path, *, resume: bool = False, settings: Any = None, warn: Any = pytest.fail) -> Any:
    output.mkdir(exist_ok=True, parents=True)
    tracker = open_tracker(TrackingConfig(uri=uri, experiment=output.parent.name), output=str(output))
    return tracked_run(tracker, name=output.name, output=output, settings=settings or {}, resume=resume, warn=warn)


def stored(run: TrackedRun) -> Any:
    return open_store(run.uri).get_run(run.run_id)


def history(run: TrackedRun, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in open_store(run.uri).get_metric_history(run.run_id, key)]


@pytest.fixture(params=["sqlite", "http"])
def uri(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("store" if request.param == "sqlite" else "server")


def test_metrics_come_with_their_steps_and_files_as_artifacts(uri: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with tracked(uri, output, settings={"optimizer": {"learning_rate": 0.1}, "model": "gpt2"}) as run:
        for step in range(2500):  # more than MLflow takes at once
            run.log({"loss": 1 / (step + 1), "worker_bytes": [1, 2], "precision": "fp32"}, step=step)
        (output / "delta").mkdir()
        (output / "delta/delta.json").write_text("{}")
        (output / "config.json").write_text("{}")
        assert run.keep(output / "config.json", output / "delta", output / "absent.png")
    assert stored(run).info.status == "FINISHED"
    assert stored(run).info.run_name == "run"
    assert stored(run).data.params == {"optimizer.learning_rate": "0.1", "model": "gpt2"}
    assert stored(run).data.metrics["worker_bytes.1"] == 2
    assert "precision" not in stored(run).data.metrics
    client = open_store(uri)
    assert [file.path for file in client.list_artifacts(run.run_id, "delta")] == ["delta/delta.json"]
    if uri.startswith("sqlite"):
        assert history(run, "loss")[2499] == (2499, 1 / 2500)
        assert len(history(run, "loss")) == 2500


def test_a_resumed_job_goes_on_in_its_run(uri: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), tracked(uri, output, settings={"workers": {"count": 2}}) as first:
        first.log({"loss": 3.0}, step=1)
        raise KeyboardInterrupt
    assert stored(first).info.status == "KILLED"
    with tracked(uri, output, settings={"workers": {"count": 1}, "new": 5}, resume=True) as second:
        assert stored(second).info.status == "RUNNING"
        second.log({"loss": 2.0}, step=2)
    assert second.run_id == first.run_id
    assert history(second, "loss") == [(1, 3.0), (2, 2.0)]
    assert stored(second).info.status == "FINISHED"
    assert stored(second).data.params == {"workers.count": "2", "new": "5"}, "MLflow's parameters never change"
    assert stored(second).data.tags["resumed.workers.count"] == "1"


def test_a_job_that_is_resumed_in_another_store_gets_a_run_there(store: str, server: str, tmp_path: Path) -> None:
    with tracked(store, tmp_path / "run") as first:
        pass
    with tracked(server, tmp_path / "run", resume=True) as second:
        pass
    assert second.run_id != first.run_id
    assert json.loads((tmp_path / "run" / RUN_FILE).read_text()) == {"run_id": second.run_id, "uri": server}


def test_a_failed_job_is_marked_so(store: str, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), tracked(store, tmp_path / "run") as run:
        raise ZeroDivisionError
    assert stored(run).info.status == "FAILED"


def test_long_values_are_cut_with_a_mark_and_harm_nothing(uri: str, tmp_path: Path) -> None:
    with tracked(uri, tmp_path / "run", settings={"sources": ["a" * 9000], "z": 1}) as run:
        pass
    value = stored(run).data.params["sources"]
    assert len(value) == 500 and value.startswith('["aaa') and value.endswith("config.json has it all)")
    assert stored(run).data.params["z"] == "1"


def test_passwords_stay_out_of_settings_and_files() -> None:
    secret = "postgresql://me:hunter2@db:5432/mlflow"
    assert flattened({"tracking": {"uri": secret}}) == {"tracking.uri": "postgresql://me:***@db:5432/mlflow"}
    assert masked("https://h/?user=a&password=hunter2&x=1") == "https://h/?user=a&password=***&x=1"
    overrides = ["data=d", "output=o", f"tracking.uri={secret}", "tracking.artifacts=s3://bucket"]
    config = load_config(TrainConfig, overrides=overrides)
    assert config.tracking.uri == secret
    assert "hunter2" not in json.dumps(config.model_dump(mode="json"))


def test_a_server_that_does_not_answer_is_told_before_anything_starts(tmp_path: Path) -> None:
    config = TrackingConfig(uri="http://me:hunter2@127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(UserError, match="tracking.uri='http://me:") as caught:
        check_tracking(config, output=str(tmp_path / "run"))
    assert "hunter2" not in str(caught.value)
    assert time.monotonic() - started < 60, "MLflow's own patience is minutes"


def test_a_server_that_dies_costs_a_warning_and_not_the_job(tmp_path: Path) -> None:
    pytest.importorskip("flask")
    warnings: list[str] = []
    with mlflow_server(tmp_path) as (url, process), tracked(url, tmp_path / "run", warn=warnings.append) as run:
        run.log({"loss": 3.0}, step=1)
        process.kill()
        process.wait()
        for step in range(2, 50):
            started = time.monotonic()
            run.log({"loss": 3.0}, step=step)
            assert time.monotonic() - started < 0.5, "no step waits for the server"
        assert run.keep(tmp_path / "log") is None
    assert any("the run goes on" in text or "lacks" in text for text in warnings), warnings
    assert any("metrics.jsonl has them all" in text for text in warnings)
    assert any("log could not be stored" in text for text in warnings)


def test_none_tracks_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(TrackingConfig(uri="none"), output=str(tmp_path / "run"))
    with tracked_run(tracker, name="x", output=tmp_path, settings={}, resume=False, warn=pytest.fail) as run:
        assert run is None
    assert list(tmp_path.iterdir()) == []


def test_auto_is_one_file_for_all_runs_under_a_folder_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    expected = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking_uri("auto", output=f"{tmp_path}/runs/alpaca/lora") == expected
    assert tracking_uri("auto", output=f"{tmp_path}/runs/lora") == expected
    assert tracking_uri("auto") == expected
    assert tracking_uri("auto", output="/data/run") == "sqlite:////data/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri("auto", output="/data/run") == "http://server:5000"
    assert tracking_uri("sqlite:////x.db") == "sqlite:////x.db"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tracking.uri=ftp://x"], "not a tracking URI"),
        (["tracking.uri=postgresql://u:hunter2@h/d"], "say with artifacts="),
        (["register_as=a/b"], "letters, digits"),
        (["register_as=a", "tracking.uri=none"], "needs an MLflow"),
        (["register_as=a", "method.type=full"], "leaves no delta"),
        (["workers.price_per_hour=-1"], "greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(TrainConfig, overrides=["data=d", "output=o", *overrides])
