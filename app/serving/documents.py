"""The documents deployment: the one replica that writes the library, and tells its copies what has changed. Thin; the
work is `app.retrieval`'s."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app.config import RetrieverConfig
from app.retrieval.changes import Changes
from app.retrieval.embedding import Embedder
from app.retrieval.folder import DOCUMENTS, read_manifest
from app.retrieval.library import DiskFull, Library, NameTaken, NoText, Prepared, Record, no_room
from app.retrieval.reading import File, Unreadable, read_file
from app.retrieval.snapshots import Snapshots
from app.retrieval.store import stored_documents
from app.serving.messages import Refusal
from app.serving.metrics import DocumentsMetrics

logger = logging.getLogger("ray.serve")

NO_LIBRARY = Refusal(
    404,
    "this server takes no documents; serve it with retriever.documents=FOLDER, a folder for them",
    code="documents_not_configured",
)
_UPLOADS_AT_ONCE = 4
_MOST_UPLOADS = 32
"""Requests with files that are worked on or wait; the next one is refused."""
_BATCH_BYTES = 2**23
"""Of changes that are told at once."""
_LOOK_EVERY_S = 1.0
_LONGEST_PAUSE_S = 600.0
"""Between attempts to write a snapshot that fail, of a full disk for example: each writes until there is no room."""


class DocumentsDeployment:
    def __init__(self, config: RetrieverConfig) -> None:
        assert config.documents is not None
        self._reading = config.uploads.reading
        embedder = Embedder(embedder_of(config))
        self._library = Library(Path(config.documents), embedder=embedder, chunking=config.uploads)
        try:
            if config.index is not None and self._library.version == 0:
                self._take_in(Path(config.index))
            self._snapshots = Snapshots(self._library, kind=config.vectors, threads=config.threads)
        except DiskFull:
            raise no_room(self._library.folder) from None
        self._uploading = ThreadPoolExecutor(_UPLOADS_AT_ONCE, "upload")
        self._num_uploads = 0
        self._metrics = DocumentsMetrics()
        self._write_from, self._pause_s = 0.0, _LOOK_EVERY_S
        self._ending = threading.Event()
        threading.Thread(target=self._keep_snapshots, name="snapshots", daemon=True).start()

    # --- what clients ask for ---

    async def add(self, files: Sequence[File]) -> list[Record] | Refusal:
        """All of them, or none; it returns once they are on the disk."""
        return await self._upload(lambda: self._records(self._library.add(list(map(self._prepared, files)))))

    async def replace(self, key: str, file: File) -> Record | Refusal:
        return await self._upload(lambda: self._replaced(key, file))

    async def remove(self, key: str) -> None | Refusal:
        try:
            return None if await asyncio.to_thread(self._library.remove, key) else no_document(key)
        except DiskFull:  # SQLite writes down what goes, too
            return _disk_full()

    async def record(self, key: str) -> Record | Refusal:
        return await asyncio.to_thread(self._library.record, key) or no_document(key)

    async def records(self, limit: int, after: str | None) -> tuple[list[Record], bool] | Refusal:
        try:
            return await asyncio.to_thread(self._library.records, limit=limit, after=after)
        except KeyError:
            return Refusal(400, f"after={after!r}: no such document", code="invalid_value", param="after")

    async def text(self, key: str) -> str | Refusal:
        text = await asyncio.to_thread(self._library.text, key)
        return no_document(key) if text is None else text

    # --- what copies ask for ---

    async def changes(self, since: int, vectors_since: int) -> Changes:
        return await asyncio.to_thread(
            self._library.changes, since, vectors_since=vectors_since, max_bytes=_BATCH_BYTES
        )

    async def snapshot_piece(self, version: int, offset: int) -> bytes | None:
        return await asyncio.to_thread(self._snapshots.piece, version, offset)

    # --- inside ---

    async def _upload(self, work: Callable[[], Any]) -> Any:
        if self._num_uploads >= _MOST_UPLOADS:
            return Refusal(429, "too many uploads are waiting", code="queue_full", retry_after_s=2)
        self._num_uploads += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._uploading, work)
        except _Unusable as error:
            return Refusal(400, str(error), code="invalid_document", param="file")
        except NameTaken as error:
            message = f"{error}; replace it with PUT /v1/documents/ID, or give another name"
            return Refusal(409, message, code="document_exists", param="name")
        except DiskFull:
            return _disk_full()
        finally:
            self._num_uploads -= 1

    def _prepared(self, file: File) -> Prepared:
        try:
            document = read_file(file, self._reading)
            return self._library.prepared(document, kind=file.kind, num_bytes=len(file.content))
        except (Unreadable, NoText) as error:
            raise _Unusable(f"{file.name}: {error}") from None

    def _records(self, keys: Sequence[str]) -> list[Record]:
        return [record for key in keys if (record := self._library.record(key)) is not None]

    def _replaced(self, key: str, file: File) -> Record | Refusal:
        if self._library.record(key) is None:  # before the work is done
            return no_document(key)
        self._library.replace(key, self._prepared(file))
        return self._library.record(key) or no_document(key)

    def _take_in(self, index: Path) -> None:
        """The documents of an index, in one transaction: after a kill it begins again."""
        prepared = (
            self._library.prepared(document, kind=kind, num_bytes=len(document.text.encode()), is_bounded=False)
            for document, kind in stored_documents(index / DOCUMENTS)
        )
        self._library.add(prepared)

    def _keep_snapshots(self) -> None:
        while not self._ending.wait(_LOOK_EVERY_S):
            self._look(time.monotonic())

    def _look(self, now: float) -> None:
        try:
            self._metrics.set_version(self._library.version)
            if now >= self._write_from:
                self._snapshots.write_if_due()
                self._pause_s = _LOOK_EVERY_S
        except Exception as error:  # searches go on over the changes, and a later attempt may succeed
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._write_from = now + self._pause_s
            logger.error(
                f"a snapshot of the documents' vectors could not be written ({type(error).__name__}: {error}); "
                f"trying again in {self._pause_s:g} s"
            )

    def __del__(self) -> None:
        if hasattr(self, "_ending"):
            self._ending.set()


class _Unusable(Exception):
    """A file that cannot become a document; the message names it."""


def embedder_of(config: RetrieverConfig) -> str:
    """Of uploads: the one that is named, the index's, or the embedded one."""
    if config.embedder is None and config.index is not None:
        return read_manifest(Path(config.index)).embedder
    return config.embedder or "embedded"


def no_document(key: str) -> Refusal:
    return Refusal(404, f"there is no document {key!r}", code="document_not_found")


def _disk_full() -> Refusal:
    logger.exception("a change of the documents was refused")
    message = "the disk of the documents is full, and nothing was changed; whoever runs the server has to make room"
    return Refusal(507, message, code="disk_full")
