"""Documents that come and go: one SQLite file that one process writes, and in which every change has a number.

It holds all there is: texts, chunks, an index of their words, and their vectors. Whoever wants to search copies it
(`replica.py`), and asks for what has changed since. The FAISS files beside it (`snapshots.py`) only save work. A change
is one transaction that is on the disk before its caller hears of it, so a kill at any moment leaves a change whole or
not made. Knows no Ray and no HTTP.
"""

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from app.config.documents import ChunkingConfig
from app.errors import UserError
from app.retrieval.changes import Change, ChangedDocument, Changes, Snapshot
from app.retrieval.chunking import Chunk, Document, chunk_document
from app.retrieval.embedding import Embedder, embedder_hash
from app.retrieval.reading import Kind
from app.retrieval.tables import LIBRARY, connect, create, transaction

FILE = "library.sqlite"
FORMAT = 1
_RECORD = """
SELECT key, name, title, kind, num_bytes, length(text), created_at, updated_at, version,
    (SELECT count(*) FROM chunks WHERE chunks.document_id = documents.id)
FROM documents JOIN contents ON contents.document_id = documents.id JOIN changes USING (key)
"""


class NameTaken(Exception):
    def __init__(self, name: str, key: str) -> None:
        super().__init__(f"there is a document {name!r} already: {key}")


MOST_CHUNKS = 20_000
"""Of a document: a passage of a word under each of a million headings is no document, and takes gigabytes."""


class NoText(Exception):
    """A document without anything to find, or with more passages than one may have."""


class DiskFull(Exception):
    """There is no room for the change, which was not made."""


@dataclass(frozen=True)
class Record:
    """What is told of a document."""

    key: str
    """Its id: stays the same when it is replaced."""
    name: str
    title: str
    kind: Kind
    """Of the file; the text of HTML is kept as Markdown."""
    num_bytes: int
    """Of the file."""
    num_characters: int
    """Of the text."""
    created_at: int
    updated_at: int
    """Unix time."""
    version: int
    """Of the library, with its last change."""
    num_chunks: int


@dataclass(frozen=True)
class Prepared:
    """A document that is cut and embedded."""

    document: Document
    kind: Kind
    num_bytes: int
    chunks: tuple[Chunk, ...]
    vectors: np.ndarray
    """float32 [chunks, width]."""


class Library:
    """From any thread; changes are made one after the other.

    Raises:
        UserError: the folder is missing, holds a library of another format or a damaged one, or has no room.
    """

    def __init__(self, folder: Path, *, embedder: Embedder, chunking: ChunkingConfig) -> None:
        if not folder.is_dir():  # made by whoever owns the disk: on the wrong machine it would be an empty library
            raise UserError(f"retriever.documents={str(folder)!r}: no such folder on this machine; make it")
        self.folder = folder
        self.embedder = embedder
        self._chunking = chunking
        self._writing, self._reading = threading.Lock(), threading.Lock()
        try:
            self._writer, self._reader = self.connection(), self.connection()
            self._open()
        except DiskFull:
            raise no_room(folder) from None
        except sqlite3.DatabaseError as error:
            raise _unusable(folder, error) from None

    def connection(self) -> sqlite3.Connection:
        """Another one to the file, for one thread at a time."""
        return connect(self.folder / FILE)

    @property
    def version(self) -> int:
        """Of the last change; 0 before the first."""
        return self._read("SELECT coalesce(max(version), 0) FROM changes")[0][0]

    @property
    def width(self) -> int:
        return self.embedder.width

    # --- changes ---

    def prepared(self, document: Document, *, kind: Kind, num_bytes: int, is_bounded: bool = True) -> Prepared:
        """With `is_bounded=False` it may have any number of passages: whoever runs the server has chosen it.

        Raises:
            NoText: it has none, none below its headings, or more than `MOST_CHUNKS` passages of it.
        """
        settings = self._chunking
        found = chunk_document(document, chunk_words=settings.chunk_words, overlap_words=settings.overlap_words)
        chunks = tuple(islice(found, MOST_CHUNKS + 1) if is_bounded else found)
        if not chunks:
            raise NoText("holds no text below its headings")
        if is_bounded and len(chunks) > MOST_CHUNKS:
            raise NoText(f"makes more than {MOST_CHUNKS} passages; part it into several documents")
        return Prepared(document, kind, num_bytes, chunks, self.embedder.embed([chunk.content for chunk in chunks]))

    def add(self, documents: Iterable[Prepared]) -> list[str]:
        """Their keys. All of them are added, or none.

        Raises:
            NameTaken: by one that is there, or twice.
            DiskFull: as every change may.
        """
        with self._transaction():
            return [self._insert(prepared) for prepared in documents]

    def replace(self, key: str, prepared: Prepared) -> bool:
        """False where there is no such document.

        Raises:
            NameTaken: by another one.
        """
        with self._transaction():
            if (number := self._number(key)) is None:
                return False
            self._replace(key, number, prepared)
        return True

    def remove(self, key: str) -> bool:
        """False where there is no such document."""
        with self._transaction():
            if (number := self._number(key)) is None:
                return False
            self._remove_chunks(number)
            self._writer.execute("DELETE FROM contents WHERE document_id = ?", [number])
            self._writer.execute("DELETE FROM documents WHERE id = ?", [number])
            self._count(key)
        return True

    # --- what is there ---

    def record(self, key: str) -> Record | None:
        rows = self._read(f"{_RECORD} WHERE key = ?", [key])
        return Record(*rows[0]) if rows else None

    def records(self, *, limit: int, after: str | None = None) -> tuple[list[Record], bool]:
        """The newest documents first, from the one behind `after` on; and whether there are more.

        Raises:
            KeyError: there is no document `after`.
        """
        last = None if after is None else self._read("SELECT id FROM documents WHERE key = ?", [after])
        if last == []:
            raise KeyError(after)
        where, values = ("", []) if last is None else ("WHERE documents.id < ?", [last[0][0]])
        rows = self._read(f"{_RECORD} {where} ORDER BY documents.id DESC LIMIT ?", [*values, limit + 1])
        return [Record(*row) for row in rows[:limit]], len(rows) > limit

    def text(self, key: str) -> str | None:
        """What chunks' offsets count in."""
        query = "SELECT text FROM contents JOIN documents ON documents.id = document_id WHERE key = ?"
        rows = self._read(query, [key])
        return rows[0][0] if rows else None

    # --- what a copy asks for ---

    def changes(self, since: int, *, vectors_since: int, max_bytes: int) -> Changes:
        """Changes after version `since`, in their order, of about `max_bytes` altogether, but one at least if there is
        one; with vectors where a change came after `vectors_since`."""
        with self._reading, transaction(self._reader, "DEFERRED"):  # all of one moment
            read = self._reader.execute
            (version,) = read("SELECT coalesce(max(version), 0) FROM changes").fetchone()
            changes, num_bytes = [], 0
            for number, key in read("SELECT version, key FROM changes WHERE version > ? ORDER BY version", [since]):
                changes.append(Change(number, key, self._changed(key, with_vectors=number > vectors_since)))
                num_bytes += _size(changes[-1])
                if num_bytes >= max_bytes:
                    break
            recipe, name = json.loads(self._fact("recipe")), self._fact("library")
            snapshot = self._snapshot()
        return Changes(name, recipe["embedder_sha256"], version, snapshot, tuple(changes))

    def snapshot(self) -> Snapshot | None:
        with self._reading:
            return self._snapshot()

    def set_snapshots(self, snapshots: Sequence[Snapshot]) -> None:
        """Those whose files are there."""
        with self._transaction():
            self._writer.execute("DELETE FROM snapshots")
            rows = [tuple(asdict(snapshot).values()) for snapshot in snapshots]
            self._writer.executemany("INSERT INTO snapshots VALUES (?, ?, ?)", rows)

    # --- inside ---

    def _open(self) -> None:
        recipe = {"embedder_sha256": embedder_hash(self.embedder.folder)} | self._chunking.model_dump(
            include={"chunk_words", "overlap_words"}
        )
        with self._transaction():
            if not self._writer.execute("SELECT 1 FROM sqlite_master").fetchone():
                create(self._writer, LIBRARY)
                self._set_fact("format", str(FORMAT))
                self._set_fact("library", secrets.token_hex(8))
                self._set_fact("recipe", json.dumps(recipe))
            if (found := self._fact("format", self._writer)) != str(FORMAT):
                raise UserError(f"{str(self.folder / FILE)!r} has format {found}, but {FORMAT} is due; move it away")
            if json.loads(self._fact("recipe", self._writer)) != recipe:
                self._prepare_again()
                self._set_fact("recipe", json.dumps(recipe))

    def _prepare_again(self) -> None:
        """With another embedder, or other chunks: every document, in one transaction."""
        query = "SELECT key, id, name, title, text, kind, num_bytes FROM documents JOIN contents ON document_id = id"
        keys = [key for (key,) in self._writer.execute("SELECT key FROM documents ORDER BY id").fetchall()]
        for wanted in keys:
            row = self._writer.execute(f"{query} WHERE key = ?", [wanted]).fetchone()
            key, number, name, title, text, kind, num_bytes = row
            document = Document(name, text, given_title=title, is_markdown=kind in ("markdown", "html"))
            (before,) = self._writer.execute("SELECT count(*) FROM chunks WHERE document_id = ?", [number]).fetchone()
            is_bounded = before <= MOST_CHUNKS  # one of an index may have had more
            try:
                prepared = self.prepared(document, kind=kind, num_bytes=num_bytes, is_bounded=is_bounded)
            except NoText:
                raise self._too_small_chunks(name) from None
            self._replace(key, number, prepared)
        self._writer.execute("DELETE FROM snapshots")
        self._set_fact("library", secrets.token_hex(8))  # its copies have to begin anew

    def _too_small_chunks(self, name: str) -> UserError:
        settings = self._chunking
        return UserError(
            f"retriever.uploads.chunk_words={settings.chunk_words} and overlap_words={settings.overlap_words} make "
            f"more than {MOST_CHUNKS} passages of {name!r} in retriever.documents={str(self.folder)!r}; choose longer "
            "passages or less overlap, or remove that document with the settings before"
        )

    def _insert(self, prepared: Prepared) -> str:
        key, now = f"doc-{secrets.token_hex(12)}", int(time.time())
        document = prepared.document
        self._check_name(document.name)
        number = self._writer.execute(
            "INSERT INTO documents (key, name, title) VALUES (?, ?, ?)", [key, document.name, document.title]
        ).lastrowid
        assert number is not None
        self._writer.execute(
            "INSERT INTO contents VALUES (?, ?, ?, ?, ?, ?)",
            [number, document.text, prepared.kind, prepared.num_bytes, now, now],
        )
        self._insert_chunks(number, prepared)
        self._count(key)
        return key

    def _replace(self, key: str, number: int, prepared: Prepared) -> None:
        document = prepared.document
        self._check_name(document.name, number)
        self._writer.execute(
            "UPDATE documents SET name = ?, title = ? WHERE id = ?", [document.name, document.title, number]
        )
        self._writer.execute(
            "UPDATE contents SET text = ?, kind = ?, num_bytes = ?, updated_at = ? WHERE document_id = ?",
            [document.text, prepared.kind, prepared.num_bytes, int(time.time()), number],
        )
        self._remove_chunks(number)
        self._insert_chunks(number, prepared)
        self._count(key)

    def _check_name(self, name: str, number: int | None = None) -> None:
        taken = self._writer.execute("SELECT key, id FROM documents WHERE name = ?", [name]).fetchone()
        if taken is not None and taken[1] != number:
            raise NameTaken(name, taken[0])

    def _insert_chunks(self, number: int, prepared: Prepared) -> None:
        for chunk, vector in zip(prepared.chunks, prepared.vectors.astype("<f4"), strict=True):
            inserted = self._writer.execute(
                'INSERT INTO chunks (document_id, title, start, "end", text) VALUES (?, ?, ?, ?, ?)',
                [number, chunk.title, chunk.start, chunk.end, chunk.text],
            )
            self._writer.execute("INSERT INTO vectors VALUES (?, ?)", [inserted.lastrowid, vector.tobytes()])

    def _remove_chunks(self, number: int) -> None:
        of_document = "(SELECT id FROM chunks WHERE document_id = ?)"
        self._writer.execute(f"DELETE FROM vectors WHERE chunk_id IN {of_document}", [number])
        self._writer.execute("DELETE FROM chunks WHERE document_id = ?", [number])

    def _count(self, key: str) -> None:
        self._writer.execute("INSERT OR REPLACE INTO changes (key) VALUES (?)", [key])

    def _number(self, key: str) -> int | None:
        found = self._writer.execute("SELECT id FROM documents WHERE key = ?", [key]).fetchone()
        return None if found is None else found[0]

    def _changed(self, key: str, *, with_vectors: bool) -> ChangedDocument | None:
        read = self._reader.execute
        document = read("SELECT id, name, title FROM documents WHERE key = ?", [key]).fetchone()
        if document is None:
            return None
        query = 'SELECT id, title, start, "end", text FROM chunks WHERE document_id = ? ORDER BY id'
        chunks = tuple(read(query, [document[0]]).fetchall())
        vectors = None
        if with_vectors:
            rows = read(
                "SELECT vector FROM vectors JOIN chunks ON id = chunk_id WHERE document_id = ? ORDER BY chunk_id",
                [document[0]],
            )
            vectors = as_vectors([row[0] for row in rows], self.width)
        return ChangedDocument(document[0], document[1], document[2], chunks, vectors)

    def _snapshot(self) -> Snapshot | None:
        row = self._reader.execute("SELECT * FROM snapshots ORDER BY version DESC LIMIT 1").fetchone()
        return None if row is None else Snapshot(*row)

    def _fact(self, name: str, connection: sqlite3.Connection | None = None) -> str:
        row = (connection or self._reader).execute("SELECT value FROM facts WHERE name = ?", [name]).fetchone()
        return "" if row is None else row[0]

    def _set_fact(self, name: str, value: str) -> None:
        self._writer.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", [name, value])

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[tuple]:
        with self._reading:
            return self._reader.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._writing, transaction(self._writer, "IMMEDIATE"):
                yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise DiskFull(str(error)) from None
            raise


def no_room(folder: Path) -> UserError:
    return UserError(f"retriever.documents={str(folder)!r}: the disk is full; make room")


def _unusable(folder: Path, error: sqlite3.DatabaseError) -> UserError:
    """What SQLite says when a library is opened, with what mends that."""
    code, file = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF, str(folder / FILE)
    if code == sqlite3.SQLITE_FULL:
        return no_room(folder)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return UserError(f"{file!r} is in use by another process ({error}); end that, or give another folder")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return UserError(f"{file!r} is damaged ({error}); put a copy of it back, or move it away")
    if code == sqlite3.SQLITE_ERROR:  # a table is not there
        return UserError(f"{file!r} holds no library ({error}); move it away, or give another folder")
    return UserError(f"{file!r} cannot be opened or written ({error}); mend the access to its folder, or the disk")


def as_vectors(blobs: Sequence[bytes], width: int) -> np.ndarray:
    """float32 [blobs, width]."""
    return np.frombuffer(b"".join(blobs), dtype="<f4").astype(np.float32, copy=False).reshape(len(blobs), width)


def _size(change: Change) -> int:
    if change.document is None:
        return 100
    vectors = change.document.vectors
    texts = sum(100 + len(title) + len(text) for _, title, _, _, text in change.document.chunks)
    return texts + (0 if vectors is None else vectors.nbytes)
