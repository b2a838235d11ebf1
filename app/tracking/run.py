"""One MLflow run per job, opened by the driver, to which rank 0's metrics come anyway.

A store that is not there is told before anything starts. One that fails later costs a warning and never the job: what
it misses stands in the run's folder.
"""

import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.atomic import write_text
from app.config.tracking import TrackingConfig
from app.errors import masked
from app.tracking.store import open_store, reason_of, sqlite_file, told_as_mistakes, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

RUN_FILE = "mlflow.json"
_LONGEST_VALUE = 500  # servers before MLflow 2 refuse longer ones, and with them the whole batch
_CUT = " … (cut; config.json has it all)"
_BATCH = 1000  # MLflow takes no more metrics at once
_FLUSH_EVERY_S = 1.0
_RETRY_AFTER_S = 15.0
_KEPT = 200_000  # metrics that wait for a store that is down

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Tracker:
    """An experiment of a store that answers; no run yet."""

    client: "MlflowClient"
    uri: str
    experiment_id: str


def open_tracker(config: TrackingConfig, *, output: str) -> Tracker | None:
    """None where tracking is off.

    Raises:
        UserError: the store does not answer, or refuses the experiment.
    """
    if config.uri == "none":
        return None
    uri = tracking_uri(config.uri, output=output)
    client = open_store(uri, create=True)
    with told_as_mistakes(uri):
        return Tracker(client, uri, _experiment(client, config, uri))


def check_tracking(config: TrackingConfig, *, output: str) -> None:
    """Whether a server answers; files are made later.

    Raises:
        UserError: it does not.
    """
    uri = tracking_uri(config.uri, output=output)
    if uri.startswith("http"):
        open_store(uri)


def _experiment(client: "MlflowClient", config: TrackingConfig, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(config.experiment)
    if found is None:
        try:
            return client.create_experiment(config.experiment, artifact_location=_artifacts(config, uri))
        except MlflowException:  # another job has just made it
            found = client.get_experiment_by_name(config.experiment)
            if found is None:
                raise
    return found.experiment_id


def _artifacts(config: TrackingConfig, uri: str) -> str | None:
    """Beside the SQLite file: MLflow's own choice is the current directory, which on a cluster is a passing one."""
    if config.artifacts is not None:
        return config.artifacts if "://" in config.artifacts else Path(config.artifacts).absolute().as_uri()
    file = sqlite_file(uri)
    return None if file is None else (file.parent / "mlflow-artifacts" / config.experiment).as_uri()


@contextmanager
def tracked_run(
    tracker: Tracker | None,
    *,
    name: str,
    output: Path,
    settings: Mapping[str, Any],
    resume: bool,
    warn: Warn,
    parent: str | None = None,
) -> Iterator["TrackedRun | None"]:
    """The run of the job in `output`, which a resumed job continues; ended with the block, as that ends.

    `parent` is the id of the run that it belongs to.
    """
    if tracker is None:
        yield None
        return
    with told_as_mistakes(tracker.uri):
        resumed = _resumed(tracker, output) if resume else None
        run_id = resumed or _created(tracker, name, parent)
        _log_settings(tracker.client, run_id, settings)
        write_text(output / RUN_FILE, json.dumps({"run_id": run_id, "uri": masked(tracker.uri)}, indent=2) + "\n")
        run = TrackedRun(tracker.client, run_id, uri=tracker.uri, warn=warn, is_new=resumed is None)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        run.end(status)


def _created(tracker: Tracker, name: str, parent: str | None) -> str:
    tags = {"mlflow.source.name": "pacos", "mlflow.source.type": "JOB"}
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    return tracker.client.create_run(tracker.experiment_id, run_name=name, tags=tags).info.run_id


def _resumed(tracker: Tracker, output: Path) -> str | None:
    """The run that `output` belongs to, running again; None where it is of another store, or is no more."""
    from mlflow.exceptions import MlflowException

    file = output / RUN_FILE
    stored = json.loads(file.read_text()) if file.exists() else {}
    if stored.get("uri") != masked(tracker.uri):
        return None
    try:
        tracker.client.update_run(stored["run_id"], status="RUNNING")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return stored["run_id"]


def _log_settings(client: "MlflowClient", run_id: str, settings: Mapping[str, Any]) -> None:
    """Settings as parameters. MLflow's never change: those that a resumed run changed become tags."""
    from mlflow.entities import Param, RunTag

    before, now = client.get_run(run_id).data.params, flattened(settings)
    new = [Param(key, value) for key, value in now.items() if key not in before]
    changed = [RunTag(f"resumed.{key}", value) for key, value in now.items() if before.get(key, value) != value]
    for start in range(0, len(new), 100):
        client.log_batch(run_id, params=new[start : start + 100])
    if changed:
        client.log_batch(run_id, tags=changed[:100])


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` as `{"a.b": "1"}`, values cut to what MLflow takes, passwords masked."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{key}.")
            continue
        text = masked(value if isinstance(value, str) else json.dumps(value))
        found[f"{prefix}{key}"] = text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - len(_CUT)] + _CUT
    return found


class TrackedRun:
    """Takes metrics at once and sends them from a thread of its own: no step waits for a store."""

    def __init__(self, client: "MlflowClient", run_id: str, *, uri: str, warn: Warn, is_new: bool = True) -> None:
        """`is_new` says that nothing has been logged to it."""
        self.client = client
        self.run_id = run_id
        self.uri = uri
        self.is_new = is_new
        self._warn = warn
        self._queue: queue.SimpleQueue[Metric] = queue.SimpleQueue()
        self._waiting: deque[Metric] = deque(maxlen=_KEPT)
        self._failed_at: float | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        """Numbers, and lists of numbers by their place; anything else stays in the run's folder."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for key, value in values.items():
            places = {f"{key}.{place}": part for place, part in enumerate(value)} if isinstance(value, list) else {}
            for name, number in (places or {key: value}).items():
                if isinstance(number, int | float) and not isinstance(number, bool):
                    self._queue.put(Metric(name, float(number), now, step))

    def keep(self, *paths: Path) -> bool:
        """Files, and folders under their names, as artifacts; whether they arrived."""
        return self.attempt(f"{', '.join(path.name for path in paths)} could not be stored", lambda: self._keep(paths))

    def _keep(self, paths: tuple[Path, ...]) -> bool:
        for path in paths:
            if path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), artifact_path=path.name)
            elif path.exists():
                self.client.log_artifact(self.run_id, str(path))
        return True

    def attempt(self, failure: str, action: Callable[[], Any]) -> Any:
        """What `action` returns; where it fails None, and a warning that begins with `failure`."""
        try:
            return action()
        except Exception as error:  # a store fails in many ways, and the run is worth more
            self._warn(f"MLflow: {failure} ({reason_of(error)})")
            return None

    def end(self, status: str, *, within_s: float = 60) -> None:
        """Send what waits, and end the run as FINISHED, FAILED or KILLED."""
        self._ending.set()
        self._thread.join(within_s)
        missing = len(self._waiting) + self._queue.qsize()
        if missing:
            self._warn(f"MLflow lacks {missing:,} of the run's values; metrics.jsonl has them all")
        self.attempt(
            f"the run could not be marked {status}", lambda: self.client.set_terminated(self.run_id, status=status)
        )

    def _send_all(self) -> None:
        while True:
            is_last = self._ending.wait(_FLUSH_EVERY_S)
            while not self._queue.empty():
                self._waiting.append(self._queue.get())
            if is_last or self._failed_at is None or time.monotonic() - self._failed_at > _RETRY_AFTER_S:
                self._send()
            if is_last:
                return

    def _send(self) -> None:
        while self._waiting:
            batch = [self._waiting[place] for place in range(min(_BATCH, len(self._waiting)))]
            try:
                self.client.log_batch(self.run_id, metrics=batch)
            except Exception as error:  # as in `attempt`
                if self._failed_at is None:
                    self._warn(
                        f"MLflow at {masked(self.uri)} does not take metrics ({reason_of(error)}); the run goes on"
                    )
                self._failed_at = time.monotonic()
                return
            self._failed_at = None
            for _ in batch:
                self._waiting.popleft()
