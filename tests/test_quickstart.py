"""`pacos quickstart` as `make quickstart` runs it, in a process of its own, with little training."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.own_ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parent.parent


def descendants(mark: str) -> list[psutil.Process]:
    """Running processes that inherited `mark` in their environment; Ray's leave their parent's process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PACOS_TEST") == mark:
                found.append(process)
    return found


def test_quickstart_goes_through_every_stage_and_leaves_nothing_running(tmp_path: Path, free_port: int) -> None:
    mark = uuid.uuid4().hex
    training = tmp_path / "train.yaml"
    training.write_text((REPOSITORY / "configs/quickstart.yaml").read_text() + "max_steps: 4\n")
    command = [Path(sys.executable).parent / "pacos", "quickstart", f"train={training}"]
    command += [f"output={tmp_path / 'run'}", f"port={free_port}"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,  # nobody at the terminal: it ends by itself
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PACOS_TEST": mark},
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=560)
        assert process.returncode == 0, printed
        deadline = time.monotonic() + 30
        while left := descendants(mark):
            assert time.monotonic() < deadline, f"processes are left: {left}"
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    assert re.search(r"records read +1,990", printed)
    assert re.search(r"held-out loss +\d\.\d+ → \d\.\d+", printed)
    for stage in ("Prepare", "Evaluate the base", "Train", "Evaluate the tuned", "Index", "Serve", "Ask"):
        assert re.search(rf"{stage}.* \d+\.\d s", printed), stage
    for address in ("/v1/chat/completions", "/docs", "dashboard", "playground"):
        assert address in printed
    assert re.search(r"(?m)^It was up, and ends now", printed) and not re.search(r"(?m)^Up$", printed)
    assert "[1] " in printed, "the retrieved answer names its sources"
    assert (tmp_path / "run/train/delta/delta.json").exists()
