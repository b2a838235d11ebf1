"""Checkpoints on a disk and on a server that speaks S3: what is complete, what is kept, what a failure leaves."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from app.errors import UserError
from app.training.checkpoint_store import CheckpointStore
from app.training.checkpointing import Checkpoint


def checkpoint(step: int, *, loss: float | None = None, size: int = 4) -> Checkpoint:
    weights = {"w": torch.full((size,), float(step))}
    metrics = {} if loss is None else {"eval_loss": loss}
    return Checkpoint(step, weights, {"w.exp_avg": weights["w"] / 2}, {"seed": 7, "metrics": metrics})


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    """An empty one of each kind."""
    if request.param == "disk":
        return CheckpointStore(tmp_path / "checkpoints")
    return CheckpointStore(request.getfixturevalue("s3").uri(f"runs/{tmp_path.name}"))


def filesystem(store: CheckpointStore) -> tuple[fs.FileSystem, str]:
    if "://" in store._place:
        return fs.FileSystem.from_uri(store._place)
    return fs.LocalFileSystem(), store.place


def test_what_was_saved_is_read_again(store: CheckpointStore) -> None:
    assert store.latest() is None and store.latest_step() == 0
    store.save(checkpoint(3, loss=2.5), keep_last=2)
    read = store.latest()
    assert read is not None and read.step == 3
    assert torch.equal(read.weights["w"], torch.full((4,), 3.0)) and read.moments.keys() == {"w.exp_avg"}
    assert read.state == {"seed": 7, "metrics": {"eval_loss": 2.5}}


def test_the_newest_and_the_best_are_kept(store: CheckpointStore) -> None:
    losses = {1: 3.0, 2: 2.0, 3: None, 4: 2.0, 5: 2.5, 6: None}
    for step, loss in losses.items():
        store.save(checkpoint(step, loss=loss), keep_last=2, keep_best=1)
        assert step in store.steps()
    assert store.steps() == [4, 5, 6], "of two equal ones the newer"
    store.save(checkpoint(7), keep_last=1, keep_best=2)
    assert store.steps() == [4, 5, 7]
    store.save(checkpoint(8), keep_last=1)
    assert store.steps() == [8]


def test_an_incomplete_step_is_no_checkpoint_and_goes_at_the_next_save(store: CheckpointStore) -> None:
    store.save(checkpoint(1), keep_last=5)
    files, root = filesystem(store)
    files.create_dir(f"{root}/step-00000002")
    with files.open_output_stream(f"{root}/step-00000002/weights.safetensors") as stream:
        stream.write(b"half")
    assert store.steps() == [1]
    assert store.latest().step == 1
    store.save(checkpoint(3), keep_last=5)
    assert store.steps() == [1, 3]
    left = {info.path for info in files.get_file_info(fs.FileSelector(root, recursive=True))}
    assert not any("step-00000002" in path for path in left)


def test_a_damaged_file_is_told(store: CheckpointStore) -> None:
    store.save(checkpoint(1), keep_last=2)
    files, root = filesystem(store)
    path = f"{root}/step-00000001/moments.safetensors"
    with files.open_input_stream(path) as stream:
        content = stream.read()
    with files.open_output_stream(path) as stream:
        stream.write(content[:-1] + b"\x01")  # as long as before: a tensor that loads and is another
    with pytest.raises(UserError, match=r"is damaged \(moments.safetensors is not what was written\)"):
        store.latest()


def test_a_checkpoint_is_readable_without_pickle(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(checkpoint(1, loss=2.0), keep_last=1)
    folder = tmp_path / "step-00000001"
    assert {path.name for path in folder.iterdir()} == {"state.json", "weights.safetensors", "moments.safetensors"}
    state = json.loads((folder / "state.json").read_text())
    assert state["files"]["weights.safetensors"]["bytes"] == (folder / "weights.safetensors").stat().st_size
    for path in folder.glob("*.safetensors"):
        header = path.read_bytes()
        assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]), "a safetensors header"


def test_a_write_that_fails_leaves_the_last_good_one_alone(tmp_path: Path) -> None:
    """The operating system refuses the file, in the middle of it."""
    store = CheckpointStore(tmp_path)
    store.save(checkpoint(1), keep_last=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match="of step 2 cannot be written in .*File too large.*goes on from step 1, wh"):
            store.save(checkpoint(2, size=100_000), keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert store.latest().step == 1


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """A file system of one megabyte, mounted for a process of its own."""
    code = f"""
        from pathlib import Path
        from app.errors import UserError
        from app.training.checkpoint_store import CheckpointStore
        from tests.training.test_checkpoint_store import checkpoint
        store = CheckpointStore({str(tmp_path)!r})
        store.save(checkpoint(1), keep_last=1)
        try:
            store.save(checkpoint(2, size=1_000_000), keep_last=1)
        except UserError as error:
            print(error)
        print(store.steps(), store.latest().step, [path.name for path in Path({str(tmp_path)!r}).iterdir()])
        store.save(checkpoint(3), keep_last=1)
        print(store.steps())
    """
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this process may not mount a file system of its own")
    shell = f'mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c "$CODE"'
    environment = {**os.environ, "CODE": textwrap.dedent(code), "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(["unshare", "-rm", "sh", "-c", shell], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told, left, after = result.stdout.splitlines()
    assert "No space left on device" in told and "free space" in told and "from step 1, whose checkpoint" in told
    assert left == "[1] 1 ['step-00000001']"
    assert after == "[3]"


def test_a_store_that_does_not_answer_is_told_and_its_checkpoints_are_there_when_it_does(s3) -> None:
    store = CheckpointStore(s3.uri("runs/unreachable"))
    store.save(checkpoint(1), keep_last=1)
    s3.stop()
    try:
        with pytest.raises(UserError, match=r"of step 2 cannot be written in 's3://bucket.*goes on from step 1, whose"):
            store.save(checkpoint(2), keep_last=1)
        with pytest.raises(UserError, match=r"cannot be listed in 's3://bucket/runs/unr.*is it there"):
            store.latest()
    finally:
        s3.start()
    assert store.latest().step == 1


@pytest.mark.parametrize(
    ("place", "part"),
    [("s4://bucket/x", "Unrecognized filesystem type"), ("/proc/1/checkpoints/x", "cannot be")],
)
def test_a_place_that_cannot_be_is_told(place: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        CheckpointStore(place).save(checkpoint(1), keep_last=1)
