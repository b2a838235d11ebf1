"""Documents and chunks in one SQLite file: the source of truth for texts, and how they are found by words.

Knows no vectors, and no changes: `library.py` has documents that come and go.
"""

import re
import sqlite3
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.retrieval.chunking import Chunk, Document
from app.retrieval.reading import Kind, kind_of

_SCHEMA = """
CREATE TABLE documents (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL,
    text TEXT NOT NULL
);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY,
    document_id INTEGER NOT NULL REFERENCES documents (id),
    title TEXT NOT NULL,
    start INTEGER NOT NULL,
    "end" INTEGER NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX chunks_of_document ON chunks (document_id);
CREATE VIRTUAL TABLE words USING fts5 (
    title, text, content = 'chunks', content_rowid = 'id', tokenize = "porter unicode61"
);
"""
_WORD = re.compile(r"\w+")
_MOST_WORDS = 100
"""Of a query; the rest of a longer one is not looked up."""


def write_store(file: Path, documents: Iterable[Document], chunks: Sequence[Chunk]) -> None:
    """Create the database `file`; a chunk's id is its position in `chunks`."""
    connection = sqlite3.connect(file)
    try:
        connection.executescript(_SCHEMA)
        rows = [(number, document.name, document.title, document.text) for number, document in enumerate(documents)]
        connection.executemany("INSERT INTO documents VALUES (?, ?, ?, ?)", rows)
        numbers = {name: number for number, name, _, _ in rows}
        connection.executemany(
            "INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)",
            [
                (number, numbers[chunk.document], chunk.title, chunk.start, chunk.end, chunk.text)
                for number, chunk in enumerate(chunks)
            ],
        )
        connection.execute("INSERT INTO words (words) VALUES ('rebuild')")
        connection.commit()
    finally:
        connection.close()


def stored_documents(file: Path) -> Iterator[tuple[Document, Kind]]:
    """The documents of a file that `write_store` made, as they were read."""
    connection = _read_only(file)
    try:
        for name, title, text in connection.execute("SELECT name, title, text FROM documents ORDER BY id"):
            kind = kind_of(name) or "text"
            yield Document(name, text, given_title=title, is_markdown=kind in ("markdown", "html")), kind
    finally:
        connection.close()


def open_store(file: Path) -> "Chunks":
    """Of a file that `write_store` made; a document's id is its name.

    The file is never changed in place: a new index replaces its whole folder. So it is opened as immutable, without
    locks or journals, and works on a read-only disk.
    """
    return Chunks(_read_only(file), key="name")


def _read_only(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)


@dataclass(frozen=True)
class FoundChunk(Chunk):
    document_id: str


class Chunks:
    """What can be searched, over an open database with tables `documents`, `chunks`, `words`. From any thread."""

    def __init__(self, connection: sqlite3.Connection, *, key: str) -> None:
        """`key`: the column of `documents` that holds its id as others know it."""
        self._connection = connection
        self._chunk = f"""SELECT chunks.id, name, chunks.title, start, "end", chunks.text, documents.{key}
            FROM chunks JOIN documents ON documents.id = document_id"""
        self._lock = threading.Lock()

    def get(self, ids: Sequence[int]) -> dict[int, FoundChunk]:
        """The chunks with these ids; one that does not exist is left out."""
        marks = ", ".join("?" * len(ids))
        rows = self._rows(f"{self._chunk} WHERE chunks.id IN ({marks})", [int(number) for number in ids])
        return {number: FoundChunk(*fields) for number, *fields in rows}

    def search(self, query: str, *, top_k: int) -> list[int]:
        """Ids of the `top_k` chunks that have most of the words of `query`, best first, by BM25 (Robertson and Zaragoza
        2009; k1 = 1.2, b = 0.75). English words count as their stems. Nothing in `query` is a command."""
        composed = unicodedata.normalize("NFC", query.lower())  # else marks of their own would part words
        words = list(dict.fromkeys(_WORD.findall(composed)))[:_MOST_WORDS]
        if not words:
            return []
        any_of_them = " OR ".join(f'"{word}"' for word in words)
        rows = self._rows(
            "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rank, rowid LIMIT ?", [any_of_them, top_k]
        )
        return [number for (number,) in rows]

    @property
    def num_documents(self) -> int:
        return self._rows("SELECT count(*) FROM documents", [])[0][0]

    def ids(self) -> list[int]:
        return [number for (number,) in self._rows("SELECT id FROM chunks", [])]

    def close(self) -> None:
        self._connection.close()

    def _rows(self, query: str, values: Sequence[object]) -> list[tuple]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()
