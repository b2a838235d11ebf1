import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from app.atomic import replaced_folder, told_if_full
from app.data.shards import FORMAT, read_manifest
from app.errors import UserError


def test_a_folder_that_holds_more_than_prepared_data_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "documents.sqlite").write_text("an index")
    with (
        pytest.raises(UserError, match="holds 'documents.sqlite', which is not ours"),
        replaced_folder(tmp_path, contents=["manifest.json", "train"]),
    ):
        pass
    assert (tmp_path / "documents.sqlite").exists()
    with pytest.raises(UserError, match="is not of prepared data"):
        read_manifest(str(tmp_path))


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "new", contents=["secret"]) as staging:
        (staging / "secret").touch(mode=0o600)
    assert (tmp_path / "new/secret").stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o666


def test_an_exception_between_the_two_renames_keeps_what_was_there(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.json").write_text("old")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder, contents=["manifest.json"]) as staging:
        (staging / "manifest.json").write_text("new")
    assert (folder / "manifest.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no manifest.json"):
        read_manifest(str(tmp_path))
    shard = {"split": "train", "file": "train/00000.parquet", "rows": 1}
    values = {"format": FORMAT, "shards": [shard], "splits": {}, "config": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({**values, "format": 1}))
    with pytest.raises(UserError, match="by another version of pacos"):
        read_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="lacks .*00000.parquet"):
        read_manifest(str(tmp_path))


def test_what_killed_processes_left_is_cleared_and_what_they_retired_comes_back(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    mine = f".data.{socket.gethostname()}-"
    for name in (f"{mine}{dead.stdout.strip()}.tmp", f"{mine}{dead.stdout.strip()}.old", f"{mine}{os.getppid()}.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(name)
    with pytest.raises(KeyboardInterrupt), replaced_folder(tmp_path / "data", contents=["manifest.json"]):
        raise KeyboardInterrupt
    assert (tmp_path / "data/manifest.json").read_text().endswith(".old")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{mine}{os.getppid()}.tmp", "data"]


def test_several_at_once_each_leave_a_whole_folder(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from app.atomic import replaced_folder\n"
        "for number in range(150):\n"
        "    with replaced_folder(Path(sys.argv[1]), contents=['a', 'b']) as staging:\n"
        "        for name in 'ab': (staging / name).write_text(f'{sys.argv[2]} {number}')\n"
    )
    folder = tmp_path / "data"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(folder), str(n)]) for n in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (folder / "a").read_text() == (folder / "b").read_text()
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error: No space left (os error 28)")]
)
def test_a_full_disk_is_told_and_what_was_there_stays(tmp_path: Path, error: Exception) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.json").write_text("old")
    with pytest.raises(UserError, match="data' cannot be written: .*free space"), told_if_full(folder), \
            replaced_folder(folder, contents=["manifest.json"]):  # fmt: skip
        raise error
    with pytest.raises(OSError, match="another file"), replaced_folder(folder, contents=["manifest.json"]):
        raise FileNotFoundError(errno.ENOENT, "another file")
    with pytest.raises(RuntimeError, match="a mistake of ours"), told_if_full(folder):
        raise RuntimeError("a mistake of ours")
    assert (folder / "manifest.json").read_text() == "old" and list(tmp_path.iterdir()) == [folder]
