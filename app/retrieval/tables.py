"""The tables of a library and of its copies, and how SQLite is told to keep them."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SEARCHED = """
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    title TEXT NOT NULL
);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
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
CREATE TRIGGER chunk_comes AFTER INSERT ON chunks BEGIN
    INSERT INTO words (rowid, title, text) VALUES (new.id, new.title, new.text);
END;
CREATE TRIGGER chunk_goes AFTER DELETE ON chunks BEGIN
    INSERT INTO words (words, rowid, title, text) VALUES ('delete', old.id, old.title, old.text);
END;
"""
"""What a copy has too. A chunk's id is never used again: AUTOINCREMENT."""
LIBRARY = (
    SEARCHED
    + """
CREATE UNIQUE INDEX documents_by_name ON documents (name);
CREATE TABLE contents (
    document_id INTEGER PRIMARY KEY REFERENCES documents (id),
    text TEXT NOT NULL,
    kind TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL
);
CREATE TABLE vectors (chunk_id INTEGER PRIMARY KEY REFERENCES chunks (id), vector BLOB NOT NULL);
CREATE TABLE changes (version INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE);
CREATE TABLE snapshots (version INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, num_chunks INTEGER NOT NULL);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
)
"""`changes` has of each document its last change alone: what a copy that lags behind has to catch up with."""


def connect(file: Path) -> sqlite3.Connection:
    """To a library's file, for one thread at a time; transactions are begun by `transaction` alone."""
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=60)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str) -> Iterator[None]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite itself ends some, of a full disk or a broken one
            connection.execute("ROLLBACK")
        raise


def create(connection: sqlite3.Connection, script: str) -> None:
    """Run `script` within the transaction that is open; `executescript` would commit it."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""
