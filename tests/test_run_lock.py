import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.errors import UserError
from app.run_lock import lock_text, locked

HOLD = """
import sys, time
from pathlib import Path
from app.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_and_one_whose_job_was_killed_is_not(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        refusal = rf"is in use by process {holder.pid} on .*; stop that one first"
        with pytest.raises(UserError, match=refusal), locked(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked(tmp_path):
            assert lock_text(tmp_path)
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_is_let_go_of_at_the_end_and_holds_within_one_process(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(UserError, match="is in use"), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"), locked(tmp_path / "file/run"):
        pass
