"""Where a run's checkpoints lie, a folder a step, and which are kept: on a disk, or in any store that pyarrow reaches.

On a disk a step appears by a rename. An object store has none: there a step counts once its state file is there, which
is written last and removed first. What a killed run left half-written is ignored, and removed at the next save.

One process writes at a time (rank 0 of the run that holds the run folder's lock); any may read.
"""

import functools
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs
from safetensors import SafetensorError

from app.atomic import replaced_folder
from app.errors import UserError
from app.training.checkpointing import CHECKPOINT_FILES, STATE_FILE, Checkpoint, read_checkpoint, write_checkpoint

UNWRITTEN = "unwritten"
"""In a checkpoint's state: rows of metrics that the driver may not have written down when it was made."""
_PREFIX = "step-"
_BUFFER_BYTES = 1 << 20


class CheckpointStore:
    """The checkpoints in `place`, a folder or a URI."""

    def __init__(self, place: str | Path) -> None:
        self._place = str(place)
        self._newest: int | None = None  # as far as this process knows

    @property
    def place(self) -> str:
        """As it may be shown: without the key that a URI may hold."""
        return re.sub(r"://[^/?]*@", "://", self._place)

    def steps(self) -> list[int]:
        """Those whose checkpoints are complete, in order.

        Raises:
            UserError: the place cannot be reached.
        """
        with self._told("cannot be listed", "is it there, and are you allowed to read it?"):
            complete = sorted(self._steps.complete())
        self._newest = max(complete, default=0)
        return complete

    def latest_step(self) -> int:
        """The newest, 0 where there is none."""
        return max(self.steps(), default=0)

    def unwritten_rows(self) -> list[dict[str, Any]]:
        """Rows of metrics, in order, that the run's folder may lack until the newest checkpoint.

        Raises:
            UserError: the place cannot be reached.
        """
        step = self.latest_step()
        with self._told("cannot be read", "is it there, and are you allowed to read it?"):
            try:
                return self._steps.state(step).get(UNWRITTEN, []) if step else []
            except (ValueError, AttributeError):  # damaged: who loads it says so
                return []

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, None where there is none.

        Raises:
            UserError: it is damaged, or the place cannot be reached.
        """
        step = self.latest_step()
        if not step:
            return None
        with (
            self._told("cannot be read", "is it there, and are you allowed to read it?"),
            self._steps.reading(step) as folder,
        ):
            return read_checkpoint(folder)

    def save(self, checkpoint: Checkpoint, *, keep_last: int, keep_best: int = 0) -> None:
        """Write `checkpoint`; once it is complete, remove all but the newest `keep_last` and the `keep_best` best.

        Raises:
            UserError: it cannot be written. Those that were there still are.
        """
        last_good = self.latest_step() if self._newest is None else self._newest
        remedy = "free space, or mend the access, or the connection; then --resume goes on " + (
            f"from step {last_good}, whose checkpoint is intact" if last_good else "from the start"
        )
        with self._told(f"of step {checkpoint.step} cannot be written", remedy):
            with self._steps.writing(checkpoint.step) as folder:
                write_checkpoint(folder, checkpoint)
            self._newest = checkpoint.step
            self._tidy(keep_last, keep_best)

    def _tidy(self, keep_last: int, keep_best: int) -> None:
        complete = sorted(self._steps.complete())
        kept = set(complete[-keep_last:])
        if keep_best:
            losses = {step: _held_out_loss(self._steps.state(step)) for step in complete}
            scored = [step for step in complete if losses[step] < math.inf]
            kept |= set(sorted(scored, key=lambda step: (losses[step], -step))[:keep_best])
        self._steps.remove_all_but(kept)

    @functools.cached_property  # to open an object store costs requests
    def _steps(self) -> "_Steps":
        if "://" not in self._place:
            return _StepsOnDisk(Path(self._place))
        return _StepsInStore(*fs.FileSystem.from_uri(self._place))

    @contextmanager
    def _told(self, what: str, remedy: str) -> Iterator[None]:
        """Errors of the storage as one that names the place, what went wrong, and what to do."""
        try:
            yield
        except (OSError, SafetensorError, ValueError) as error:  # of pyarrow, a URI that it does not know
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise UserError(f"the checkpoint {what} in {self.place!r}: {reason}; {remedy}") from None


class _Steps(Protocol):
    """What the store needs of a kind of place; errors are OSErrors."""

    def complete(self) -> list[int]: ...

    def state(self, step: int) -> dict[str, Any]: ...

    @contextmanager
    def reading(self, step: int) -> Iterator[Path]:
        """A folder on a disk that holds the step's files."""
        ...

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """An empty folder on a disk; what is in it when the block ends well becomes the step."""
        ...

    def remove_all_but(self, kept: set[int]) -> None:
        """Remove other steps, and what is incomplete."""
        ...


class _StepsOnDisk:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def complete(self) -> list[int]:
        # A folder that is not there holds none. One that may not be read is an error, where `glob` would be silent.
        entries = list(self.folder.iterdir()) if self.folder.exists() else []
        steps = ((_step_of(path.name), path) for path in entries)
        return [step for step, path in steps if step is not None and (path / STATE_FILE).is_file()]

    def state(self, step: int) -> dict[str, Any]:
        return json.loads((self.folder / _name(step) / STATE_FILE).read_text(encoding="utf-8"))

    @contextmanager
    def reading(self, step: int) -> Iterator[Path]:
        yield self.folder / _name(step)

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        with replaced_folder(self.folder / _name(step), contents=CHECKPOINT_FILES) as staging:
            yield staging

    def remove_all_but(self, kept: set[int]) -> None:
        for path in self.folder.iterdir():
            if _step_of(path.name.removeprefix(".").partition(".")[0]) is not None and _step_of(path.name) not in kept:
                shutil.rmtree(path)


class _StepsInStore:
    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self.filesystem, self.root = filesystem, root.rstrip("/")

    def complete(self) -> list[int]:
        return [step for step, files in self._listed().items() if STATE_FILE in files]

    def state(self, step: int) -> dict[str, Any]:
        with self.filesystem.open_input_stream(self._path(step, STATE_FILE)) as stream:
            return json.loads(stream.read())

    @contextmanager
    def reading(self, step: int) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="pacos-checkpoint-") as spool:
            for name in CHECKPOINT_FILES:
                source, target = self.filesystem.open_input_stream(self._path(step, name)), Path(spool, name)
                with source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy, _BUFFER_BYTES)
            yield Path(spool)

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="pacos-checkpoint-") as spool:
            yield Path(spool)
            self.filesystem.create_dir(f"{self.root}/{_name(step)}")  # HDFS wants it; on S3 it is an empty object
            for name in reversed(CHECKPOINT_FILES):  # the state last
                with (
                    Path(spool, name).open("rb") as source,
                    self.filesystem.open_output_stream(self._path(step, name)) as target,
                ):
                    shutil.copyfileobj(source, target, _BUFFER_BYTES)

    def remove_all_but(self, kept: set[int]) -> None:
        for step, files in self._listed().items():
            if step not in kept:
                if STATE_FILE in files:
                    self.filesystem.delete_file(self._path(step, STATE_FILE))
                self.filesystem.delete_dir(f"{self.root}/{_name(step)}")

    def _listed(self) -> dict[int, set[str]]:
        """The files of each step."""
        selector = fs.FileSelector(self.root, recursive=True, allow_not_found=True)
        found: dict[int, set[str]] = {}
        for info in self.filesystem.get_file_info(selector):
            folder, _, name = info.path.removeprefix(self.root).strip("/").partition("/")
            step = _step_of(folder)
            if step is not None:
                found.setdefault(step, set()).update({name} if name else ())
        return found

    def _path(self, step: int, name: str) -> str:
        return f"{self.root}/{_name(step)}/{name}"


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def _step_of(name: str) -> int | None:
    digits = name.removeprefix(_PREFIX)
    return int(digits) if name.startswith(_PREFIX) and digits.isdecimal() else None


def _held_out_loss(state: dict[str, Any]) -> float:
    """Infinite where the step was not evaluated."""
    return state.get("metrics", {}).get("eval_loss", math.inf)
