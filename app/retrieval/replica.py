"""A copy of a library, to be searched: it begins with nothing, asks for what has changed, and goes with its process.

Copies share no storage with the library, so they may be anywhere and as many as there are readers.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from app.config.base import SearchMode
from app.errors import UserError
from app.retrieval.changes import Change, ChangedDocument, Changes, Snapshot
from app.retrieval.embedding import Embedder, embedder_hash
from app.retrieval.index import LiveVectors, VectorIndex
from app.retrieval.search import Passage, search_passages
from app.retrieval.store import Chunks
from app.retrieval.tables import SEARCHED

logger = logging.getLogger(__name__)


class Source(Protocol):
    """A library, wherever it is."""

    def changes(self, since: int, vectors_since: int) -> Changes: ...

    def snapshot_piece(self, version: int, offset: int) -> bytes | None: ...


class Follower:
    """A replica that keeps up with a library. `search` may be called from any thread, `catch_up` from one at a time."""

    def __init__(self, source: Source, embedder: Embedder) -> None:
        self._source = source
        self._embedder = embedder
        self._embedder_sha256 = embedder_hash(embedder.folder)
        self._replica: _Replica | None = None

    @property
    def version(self) -> str:
        """Of the documents that are searched at least; another one for other documents."""
        replica = self._replica
        return "" if replica is None else f"{replica.library}-{replica.version}"

    @property
    def num_changes(self) -> int:
        """The number of the last change that is searched."""
        return 0 if self._replica is None else self._replica.version

    @property
    def num_documents(self) -> int:
        """How many are searched."""
        return 0 if self._replica is None else self._replica.chunks.num_documents

    def search(self, query: str, *, top_k: int, mode: SearchMode = "hybrid") -> list[Passage]:
        """As `search_passages`. There must have been a `catch_up`."""
        replica = self._replica
        assert replica is not None
        return search_passages(query, self._embedder, replica.vectors, replica.chunks, top_k=top_k, mode=mode)

    def catch_up(self) -> bool:
        """Whether there was anything new.

        Raises:
            UserError: the library was embedded by another embedder.
        """
        before, replica = self.version, self._replica
        if replica is None or not replica.follow(self._source):
            replica = self._new_replica()
        self._replica = replica
        return self.version != before

    def _new_replica(self) -> "_Replica":
        """A whole copy; until it is complete, the one before is searched."""
        head = self._source.changes(0, 0)
        if head.embedder_sha256 != self._embedder_sha256:
            raise UserError(
                f"the documents were embedded by another embedder than {self._embedder.name!r} as it is on this "
                "machine; give all machines the same files"
            )
        while True:
            replica = _Replica(head.library, self._embedder.width)
            if head.snapshot is not None:
                replica.load(self._source, head.snapshot)
            if replica.follow(self._source):
                replica.settle()
                return replica
            head = self._source.changes(0, 0)


class _Replica:
    def __init__(self, library: str, width: int) -> None:
        self.library = library
        self.version = 0
        self._width = width
        self._snapshot_version = 0
        self._seen_snapshot = 0
        self._folder = _Folder()
        file = self._folder.path / "replica.sqlite"
        self._writer = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        self._writer.execute("PRAGMA journal_mode = WAL")  # searches go on while it is written
        self._writer.execute("PRAGMA synchronous = OFF")  # nobody reads it after a crash
        self._writer.executescript(SEARCHED)
        self.chunks = Chunks(sqlite3.connect(file, check_same_thread=False), key="key")
        self.vectors = LiveVectors.empty(width)

    def follow(self, source: Source) -> bool:
        """Take all changes; False where the library is not the one that this is a copy of."""
        while True:
            changes = source.changes(self.version, self._snapshot_version)
            if changes.library != self.library or changes.version < self.version:
                return False
            if changes.changes:
                self._apply(changes.changes)
            if self.version == changes.version:
                break
        newest = changes.snapshot
        if newest is not None and newest.version > self._seen_snapshot and self.load(source, newest):
            self.settle()
        return True

    def load(self, source: Source, snapshot: Snapshot) -> bool:
        """Take the snapshot's vectors for those up to its version; False, and as before, where it is broken."""
        self._seen_snapshot = snapshot.version
        file = self._folder.path / f"{snapshot.version}.faiss"
        try:
            if not _fetch(source, snapshot, file):
                return False
            base = VectorIndex(file)
        except RuntimeError as error:
            logger.error(f"snapshot {snapshot.version} of the documents cannot be read ({error}); going without it")
            return False
        finally:
            file.unlink(missing_ok=True)
        self.vectors = self.vectors.rebased(base)
        self._snapshot_version = snapshot.version
        return True

    def settle(self) -> None:
        """Leave out what the snapshot has and the documents have not."""
        self.vectors = self.vectors.without_absent(np.asarray(self.chunks.ids(), dtype=np.int64))

    def _apply(self, changes: Sequence[Change]) -> None:
        gone: list[int] = []
        new: list[ChangedDocument] = []
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            for change in changes:
                gone += self._remove(change.key)
                if change.document is not None:
                    self._insert(change.key, change.document)
                    new.append(change.document)
        except BaseException:
            self._writer.execute("ROLLBACK")
            raise
        self._writer.execute("COMMIT")
        embedded = [document for document in new if document.vectors is not None]
        self.vectors = self.vectors.changed(
            gone=gone,
            ids=[chunk[0] for document in embedded for chunk in document.chunks],
            vectors=np.concatenate([np.zeros((0, self._width), np.float32), *(d.vectors for d in embedded)]),
        )
        self.version = changes[-1].version  # last: an answer must not be newer in name than in fact

    def _remove(self, key: str) -> list[int]:
        found = self._writer.execute("SELECT id FROM documents WHERE key = ?", [key]).fetchone()
        if found is None:
            return []
        chunks = self._writer.execute("SELECT id FROM chunks WHERE document_id = ?", found).fetchall()
        self._writer.execute("DELETE FROM chunks WHERE document_id = ?", found)
        self._writer.execute("DELETE FROM documents WHERE id = ?", found)
        return [number for (number,) in chunks]

    def _insert(self, key: str, document: ChangedDocument) -> None:
        self._writer.execute(
            "INSERT INTO documents VALUES (?, ?, ?, ?)", [document.id, key, document.name, document.title]
        )
        self._writer.executemany(
            "INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)",
            [(number, document.id, *rest) for number, *rest in document.chunks],
        )


class _Folder:
    """A temporary folder that goes with this object. Those of processes that were killed go when the next one is made:
    nobody holds their lock."""

    _PREFIX = "pacos-replica-"

    def __init__(self) -> None:
        for leftover in Path(tempfile.gettempdir()).glob(f"{self._PREFIX}*"):
            with suppress(OSError):  # another user's, or one that someone else removes
                if (held := _lock(leftover)) is not None:
                    shutil.rmtree(leftover, ignore_errors=True)
                    os.close(held)
        self.path = Path(tempfile.mkdtemp(prefix=self._PREFIX))
        self._held = _lock(self.path)

    def __del__(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._held is not None:
            os.close(self._held)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where another one does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _fetch(source: Source, snapshot: Snapshot, file: Path) -> bool:
    """Write the snapshot to `file`; False where it is not what it was, or is not there any more."""
    digest, offset = hashlib.sha256(), 0
    with file.open("wb") as stream:
        while piece := source.snapshot_piece(snapshot.version, offset):
            stream.write(piece)
            digest.update(piece)
            offset += len(piece)
    if digest.hexdigest() == snapshot.sha256:
        return True
    if piece is not None:  # None: a newer one has taken its place
        logger.error(f"snapshot {snapshot.version} of the documents does not match its hash; going without it")
    return False
