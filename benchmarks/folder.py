"""Where a benchmark keeps what it makes."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def kept_or_temporary(folder: Path | None) -> Iterator[Path]:
    """`folder`, made if need be, for the next time; or one that goes with the block."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
