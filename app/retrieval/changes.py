"""What a library tells its copies. It travels from process to process."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ChangedDocument:
    id: int
    name: str
    title: str
    chunks: tuple[tuple[int, str, int, int, str], ...]
    """(id, title, start, end, text) of each."""
    vectors: np.ndarray | None
    """float32 [chunks, width]; None where the asker has them in a snapshot."""


@dataclass(frozen=True)
class Change:
    version: int
    key: str
    document: ChangedDocument | None
    """None: it has gone."""


@dataclass(frozen=True)
class Snapshot:
    """A FAISS file of all chunks as they were at `version`."""

    version: int
    sha256: str
    num_chunks: int


@dataclass(frozen=True)
class Changes:
    """What a copy is told."""

    library: str
    """Which library this is; a copy of another one has to begin anew."""
    embedder_sha256: str
    version: int
    """The newest there is."""
    snapshot: Snapshot | None
    changes: tuple[Change, ...]
    """The first of those that were asked for."""
