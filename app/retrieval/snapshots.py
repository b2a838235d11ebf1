"""FAISS files of a library's vectors: derived from it, named by its version, made again where one is missing or broken.

One of them is due when a tenth of what it would hold is new: what has come since is searched one by one.
"""

import logging
import os
import shutil
from pathlib import Path

import numpy as np

from app.config.base import VectorKind
from app.retrieval.changes import Snapshot
from app.retrieval.folder import file_sha256
from app.retrieval.library import Library, as_vectors
from app.retrieval.tables import transaction
from app.retrieval.vector_build import build_vectors

logger = logging.getLogger(__name__)

PIECE_BYTES = 2**25
"""In which a file is handed out."""
_DUE_SHARE = 0.1
_ROWS = 1000
"""That are read at once."""
_KEPT = 2
"""The newest, and the one before, which someone may be reading."""


class Snapshots:
    """Of one library; one thread makes them."""

    def __init__(self, library: Library, *, kind: VectorKind, threads: int) -> None:
        self._library = library
        self._kind = kind
        self._threads = threads
        self._connection = library.connection()
        self._forget_broken()

    def write_if_due(self) -> bool:
        """Whether one was written."""
        newest = self._library.snapshot()
        if newest is not None and newest.version == self._library.version:
            return False
        with transaction(self._connection, "DEFERRED"):  # all that is read is of one moment
            if not self._is_due(newest):
                return False
            (version,) = self._connection.execute("SELECT coalesce(max(version), 0) FROM changes").fetchone()
            ids, vectors = self._vectors()
        self._write(version, ids, vectors)
        return True

    def piece(self, version: int, offset: int) -> bytes | None:
        """`PIECE_BYTES` of a file, fewer at its end, none behind it; None where that version is not there any more."""
        try:
            with self._file(version).open("rb") as file:
                file.seek(offset)
                return file.read(PIECE_BYTES)
        except FileNotFoundError:
            return None

    def _is_due(self, newest: Snapshot | None) -> bool:
        version, num_chunks = (newest.version, newest.num_chunks) if newest else (0, 0)
        (count,) = self._connection.execute("SELECT count(*) FROM chunks").fetchone()
        (new,) = self._connection.execute(
            """SELECT count(*) FROM changes JOIN documents USING (key) JOIN chunks ON document_id = documents.id
            WHERE version > ?""",
            [version],
        ).fetchone()
        gone = num_chunks - (count - new)
        return new + gone > _DUE_SHARE * num_chunks

    def _vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 ids [chunks] and float32 vectors [chunks, width], not held twice."""
        read, width = self._connection.execute, self._library.width
        ids = np.fromiter((row[0] for row in read("SELECT chunk_id FROM vectors ORDER BY chunk_id")), np.int64)
        vectors = np.empty((len(ids), width), dtype=np.float32)
        rows = read("SELECT vector FROM vectors ORDER BY chunk_id")
        for start in range(0, len(ids), _ROWS):
            part = [row[0] for row in rows.fetchmany(_ROWS)]
            vectors[start : start + len(part)] = as_vectors(part, width)
        return ids, vectors

    def _write(self, version: int, ids: np.ndarray, vectors: np.ndarray) -> None:
        file = self._file(version)
        staging = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            build_vectors(staging, vectors, ids=ids, kind=self._kind, threads=self._threads)
            snapshot = Snapshot(version, file_sha256(staging), len(ids))
            staging.replace(file)
            before = [known for known in self._known() if known.version != version]
            self._library.set_snapshots([snapshot, *before][:_KEPT])
        finally:
            self._clear()  # on a full disk, too: what could not be finished

    def _forget_broken(self) -> None:
        sound = []
        for snapshot in self._known():
            file = self._file(snapshot.version)
            if file.is_file() and file_sha256(file) == snapshot.sha256:
                sound.append(snapshot)
            else:
                logger.warning(f"{file} is missing or broken; it will be made again")
        if sound != self._known():
            self._library.set_snapshots(sound)
        self._clear()

    def _clear(self) -> None:
        """Files that no row knows: of earlier versions, of what failed, or left by a process that was killed."""
        kept = {self._file(snapshot.version) for snapshot in self._known()}
        for path in [*self._library.folder.glob("vectors-*.faiss"), *self._library.folder.glob(".vectors-*.tmp")]:
            if path not in kept:
                path.unlink(missing_ok=True)
        for folder in self._library.folder.glob(".build-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _known(self) -> list[Snapshot]:
        rows = self._connection.execute("SELECT * FROM snapshots ORDER BY version DESC").fetchall()
        return [Snapshot(*row) for row in rows]

    def _file(self, version: int) -> Path:
        return self._library.folder / f"vectors-{version}.faiss"
