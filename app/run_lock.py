"""One job at a time in a run's folder.

An flock: the kernel lets go of it when its process ends, however it ends, so a killed job leaves nothing to clear away.
It holds between processes of one machine, and between machines where the shared file system carries locks (NFS 4 and
most cluster file systems do, Lustre when mounted with `flock`). Where there are none at all, the run goes on without.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from app.atomic import make_folder
from app.errors import UserError

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the run folder `output`, which is made unless it is there.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    make_folder(output)
    try:
        stream = (output / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(output, error) from None
    with stream:
        _take(stream, output)
        yield


def _take(stream: TextIO, output: Path) -> None:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    try:
        _flock(stream)
        stream.truncate(0)
        stream.write(json.dumps(owner) + "\n")
        stream.flush()
    except BlockingIOError:
        raise UserError(f"output={str(output)!r} is in use by {_owner(output)}; stop that one first") from None
    except OSError as error:
        raise _unwritable(output, error) from None


def _flock(stream: TextIO) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def lock_text(output: Path) -> str:
    """What the lock's holder wrote; the same on every node that sees the folder, else empty."""
    try:
        return (output / LOCK_FILE).read_text(encoding="utf-8")
    except OSError:
        return ""


def _owner(output: Path) -> str:
    try:
        owner = json.loads(lock_text(output))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError):
        return "another process"


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"output={str(output)!r} cannot be written: {error.strerror}")
