"""Files and folders that appear as a whole or not at all."""

import errno
import glob
import os
import shutil
import socket
import sqlite3
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from app.errors import UserError


@contextmanager
def replaced_folder(folder: Path, *, contents: Collection[str]) -> Iterator[Path]:
    """An empty staging folder that takes `folder`'s place when the block ends well, and vanishes when it does not.

    Staging lies beside `folder`, on the same file system, so that the last step is a rename. `contents` are the names
    of all that such a folder may hold.

    Raises:
        UserError: as `check_replaceable`.
    """
    check_replaceable(folder, contents)
    make_folder(folder.parent)
    _clear_leftovers(folder)
    mine = f".{folder.name}.{socket.gethostname()}-{os.getpid()}"
    staging, retired = folder.with_name(f"{mine}.tmp"), folder.with_name(f"{mine}.old")
    make_folder(staging)
    try:
        yield staging
        for file in staging.rglob("*"):  # safetensors makes files that only their owner can read
            file.chmod(file.stat().st_mode | (staging.stat().st_mode & 0o666))
        _swap(staging, folder, retired)
    except BaseException:
        if retired.exists() and not folder.exists():
            retired.rename(folder)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def told_if_full(path: Path) -> Iterator[None]:
    """For the block, which reads other files too, a full disk as an error that names what was to be written.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError, sqlite3.Error, RuntimeError) as error:
        if not _tells_of_a_full_disk(error):
            raise
        told = str(error).strip().splitlines()[-1]  # of another process, the end of its traceback
        raise UserError(f"{str(path)!r} cannot be written: {told}; free space, or name another disk") from None


def _tells_of_a_full_disk(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    if isinstance(error, SafetensorError):  # has the number in its words alone
        return any(f"os error {number}" in str(error) for number in full)
    return any(os.strerror(number) in str(error) for number in full)  # of FAISS, which has what C calls it


@contextmanager
def told_if_unwritable(path: Path) -> Iterator[None]:
    """For the block, which writes `path`, errors of the disk as one that names it.

    Raises:
        UserError: the path cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(path)!r} cannot be written: {error}; free space, or mend the access") from None


def check_apart(output: Path, *inputs: Path) -> None:
    """Refuse to replace what is being read.

    Raises:
        UserError: `output` is one of `inputs`, or lies in one.
    """
    for folder in inputs:
        if output.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"output={str(output)!r} is what is read from, or in it; name another folder")


def _swap(staging: Path, folder: Path, retired: Path) -> None:
    """Put `staging` in `folder`'s place. Another process may be doing the same: the last one stays."""
    for _ in range(100):
        try:
            if folder.exists():
                folder.rename(retired)
            staging.rename(folder)
            return
        except FileNotFoundError:  # the other has just retired the folder
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(retired, ignore_errors=True)  # the other's folder came between; retire that one too
    raise UserError(f"output={str(folder)!r} is being replaced by other processes again and again; stop them")


def _clear_leftovers(folder: Path) -> None:
    """Remove what processes of this machine that were killed left beside `folder`; bring back what one had retired."""
    prefix = f".{folder.name}.{socket.gethostname()}-"
    for leftover in folder.parent.glob(f"{glob.escape(prefix)}*"):
        pid = leftover.name.removeprefix(prefix).partition(".")[0]
        if pid.isdecimal() and int(pid) != os.getpid() and _is_running(int(pid)):
            continue
        if leftover.suffix == ".old" and not folder.exists():
            leftover.rename(folder)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check_replaceable(folder: Path, contents: Collection[str]) -> None:
    """Refuse to replace what was not made by us.

    Raises:
        UserError: `folder` is a file, or holds anything that `contents` does not name.
    """
    if folder.is_file():
        raise UserError(f"output={str(folder)!r} is a file; name a folder")
    try:
        foreign = {entry.name for entry in folder.iterdir()} - set(contents) if folder.is_dir() else set()
    except FileNotFoundError:  # another process is replacing it this very moment
        foreign = set()
    if foreign:
        raise UserError(f"output={str(folder)!r} holds {min(foreign)!r}, which is not ours; name another folder")


def make_folder(folder: Path) -> None:
    """Create `folder` and those above it, unless they are there.

    Raises:
        UserError: the path cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output folder {str(folder)!r} cannot be made: {error.strerror}") from None


@contextmanager
def replaced_file(file: Path) -> Iterator[Path]:
    """A staging path that takes `file`'s place when the block ends well, with its rights if it was there; its folder
    is made if need be.

    Raises:
        UserError: the path cannot be written.
    """
    make_folder(file.parent)
    staging = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield staging
        with suppress(FileNotFoundError):
            staging.chmod(stat.S_IMODE(file.stat().st_mode))
        staging.replace(file)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise UserError(f"{str(file)!r} cannot be written: {error.strerror}") from None


def write_text(file: Path, text: str) -> None:
    """Replace `file`'s content in one step, making its folder if need be.

    Raises:
        UserError: the path cannot be written.
    """
    with replaced_file(file) as staging:
        staging.write_text(text, encoding="utf-8")
