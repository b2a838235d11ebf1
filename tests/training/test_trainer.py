import asyncio
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from app.atomic import told_if_unwritable
from app.config import TrainConfig, validate
from app.errors import Diverged, Interrupted, UserError
from app.training.channel import _ChannelActor
from app.training.checkpoint_store import UNWRITTEN, CheckpointStore
from app.training.checkpointing import Checkpoint
from app.training.ending import EndRun
from app.training.interruption import Stopped
from app.training.recording import recorded
from app.training.run_log import RunLog, first, last
from app.training.trainer import _ending, _fit, _on_shared_storage


class Wire:
    """A channel whose driver is there."""

    def is_closed(self) -> bool:
        return False


def after_exceptions(*errors: Exception) -> None:
    wrapped = {rank: UserExceptionWithTraceback(error, "a traceback") for rank, error in enumerate(errors)}
    EndRun(Wire()).after_exception(None, wrapped)


@pytest.mark.parametrize("mistake", [UserError("no such folder"), FloatingPointError("the loss is nan"), Stopped(3, 9)])
def test_what_no_retry_mends_ends_the_run_whatever_befell_the_other_workers(mistake: Exception) -> None:
    with pytest.raises(type(mistake)):
        after_exceptions(RuntimeError("connection closed by peer"), mistake)


def test_any_other_error_is_left_to_be_retried() -> None:
    after_exceptions(KeyError("bug"), RuntimeError("connection closed by peer"))


@pytest.mark.parametrize(
    ("cause", "kind", "part"),
    [
        (UserError("no such folder"), UserError, "no such folder"),
        (FloatingPointError("the loss is nan"), Diverged, "the loss is nan"),
        (OSError(28, "No space left on device"), UserError, "'/run/ray': Ray Train's own records cannot be written"),
        (Stopped(3, 9), Interrupted, "stopped after step 3 of 9, which is saved"),
    ],
)
def test_the_controllers_error_comes_without_ray_around_it(cause: Exception, kind: type, part: str) -> None:
    ending = _ending(ControllerError(cause), Path("/run"))
    assert type(ending) is kind and part in str(ending)


def test_an_error_of_another_kind_keeps_its_traceback(tmp_path: Path) -> None:
    assert _ending(RuntimeError("bug"), tmp_path) is None


def test_a_worker_that_does_not_see_the_run_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.training.trainer.SEEN_WITHIN_S", 0)
    calls = []
    function = _on_shared_storage(calls.append)
    with pytest.raises(UserError, match="must lie on storage that all nodes share"):
        function({"output": tmp_path, "lock": "mine"})
    (tmp_path / ".lock").write_text("mine")
    function({"output": tmp_path, "lock": "mine"})
    assert len(calls) == 1


def test_where_metrics_cannot_be_recorded_the_run_is_stopped_and_that_is_told() -> None:
    class Both:
        """A channel, and a trainer that goes on until it is asked to stop."""

        def __init__(self) -> None:
            self.stop = threading.Event()
            self.ask_to_stop = self.stop.set

        def take(self) -> list[dict]:
            return [{"step": 1}]

        def fit(self) -> None:
            assert self.stop.wait(60)
            raise ControllerError(Stopped(3, 9))

    def record(metrics: dict) -> None:
        raise UserError("metrics.jsonl cannot be written")

    both = Both()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written"):
        _fit(both, both, record)
    assert both.stop.is_set()


def test_metrics_lie_in_the_file_alone_and_a_step_that_comes_again_replaces_what_followed(tmp_path: Path) -> None:
    log = RunLog(tmp_path, start_step=0)
    tracemalloc.start()
    for step in range(3000):
        log.add({"step": step, "loss": 1.0 + step})
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 50_000, "a run may have millions of steps"
    log.add({"step": 10, "loss": 0.5})
    assert [row["step"] for row in log.rows] == list(range(11))
    assert (first(log.rows, "loss"), last(log.rows, "loss"), last(log.rows, "other")) == (1.0, 0.5, None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # killed while it wrote
    resumed = RunLog(tmp_path, start_step=9)
    resumed.add({"step": 10, "loss": 2.0})
    assert [row["loss"] for row in resumed.rows][-2:] == [10.0, 2.0] and len(resumed.rows) == 11


def test_a_worker_is_told_how_much_the_driver_may_not_have_written() -> None:
    async def run() -> None:
        wire = _ChannelActor()
        assert [await wire.put(step) for step in (0, 1)] == [1, 2]
        assert await wire.take() == [0, 1]
        assert await wire.put(2) == 3, "the driver may still be at it"
        assert await wire.take() == [2] and await wire.put(3) == 2
        assert await wire.take() == [3] and await wire.take() == [] and await wire.put(4) == 1

    asyncio.run(run())


def test_what_a_killed_driver_had_yet_to_write_comes_from_the_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = validate(TrainConfig, {"data": "data", "output": str(output), "tracking": {"uri": "none"}})
    checkpoints = CheckpointStore(output / "checkpoints")
    given: dict[str, Any] = {"inputs": "hash", "checkpoints": checkpoints, "title": "", "on_metrics": print}
    with recorded(config, **given, resume=False, warn=print) as recording:
        for step in range(4):
            recording.add({"step": step, "loss": 1.0})
    rows = [{"step": step, "loss": 2.0} for step in range(2, 7)]  # of which two have been written after all
    checkpoints.save(Checkpoint(6, {}, {}, {UNWRITTEN: rows}), keep_last=1)
    with recorded(config, **given, resume=True, warn=print) as recording:
        assert [row["step"] for row in recording.log.rows] == list(range(7))
        assert [row["loss"] for row in recording.log.rows] == [1.0] * 4 + [2.0] * 3
    (output / "checkpoints/step-00000006/state.json").write_text("{")
    assert checkpoints.unwritten_rows() == []


def test_a_full_disk_under_metrics_or_result_is_told(tmp_path: Path) -> None:
    log = RunLog(tmp_path, start_step=0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics.jsonl' cannot be written: No space left on device"):
        log.add({"step": 1})
    full = Path("/dev/full")
    with pytest.raises(UserError, match="'/dev/full' cannot be written: .*No space left"), told_if_unwritable(full):
        full.write_text("too much")
