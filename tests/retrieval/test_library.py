import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from app.config.documents import ChunkingConfig
from app.errors import UserError
from app.retrieval import library as library_module
from app.retrieval.changes import Changes
from app.retrieval.chunking import Document
from app.retrieval.embedding import Embedder
from app.retrieval.library import FILE, DiskFull, Library, NameTaken, NoText, Prepared
from app.retrieval.tables import connect

CHUNKING = ChunkingConfig(chunk_words=12, overlap_words=3)


@pytest.fixture
def embedder(tiny_embedder: Path) -> Embedder:
    return Embedder(str(tiny_embedder))


@pytest.fixture
def library(tmp_path: Path, embedder: Embedder) -> Library:
    return Library(tmp_path, embedder=embedder, chunking=CHUNKING)


def prepared(library: Library, name: str, text: str) -> Prepared:
    return library.prepared(Document(name, text), kind="markdown", num_bytes=len(text.encode()))


def add(library: Library, name: str, text: str) -> str:
    (key,) = library.add([prepared(library, name, text)])
    return key


def all_changes(library: Library, since: int = 0, *, vectors_since: int = 0) -> Changes:
    return library.changes(since, vectors_since=vectors_since, max_bytes=10**9)


def test_a_document_is_told_of_as_it_came_and_its_id_outlives_replacement(library: Library) -> None:
    text = "# Hay\n\nAn adult alpaca eats hay — 🦙.\n"
    key = add(library, "hay.md", text)
    record = library.record(key)
    assert record is not None and library.text(key) == text
    assert (record.name, record.title, record.version, record.num_chunks) == ("hay.md", "Hay", 1, 1)
    assert (record.num_bytes, record.num_characters) == (len(text.encode()), len(text))
    assert library.replace(key, prepared(library, "straw.md", "# Straw\n\nIt is for lying on, not for eating.\n"))
    replaced = library.record(key)
    assert replaced is not None and (replaced.key, replaced.name, replaced.title) == (key, "straw.md", "Straw")
    assert replaced.version == 2 and replaced.created_at == record.created_at
    assert library.remove(key) and library.record(key) is None and library.text(key) is None
    assert library.version == 3
    assert not library.remove(key) and not library.replace(key, prepared(library, "a.md", "text"))
    assert library.version == 3, "what changes nothing has no number"


def test_offsets_of_chunks_are_of_the_stored_text(library: Library, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        add(library, name, text)
    for change in all_changes(library).changes:
        assert change.document is not None
        stored = library.text(change.key)
        assert stored is not None
        assert all(stored[start:end] == text for _, _, start, end, text in change.document.chunks)


def test_all_documents_of_a_request_are_added_or_none(library: Library) -> None:
    key = add(library, "a.md", "some text")
    with pytest.raises(NameTaken, match=f"'a.md' already: {key}"):
        library.add([prepared(library, "b.md", "more text"), prepared(library, "a.md", "other text")])
    with pytest.raises(NameTaken):
        library.add([prepared(library, "c.md", "text"), prepared(library, "c.md", "text")])
    assert [record.name for record in library.records(limit=10)[0]] == ["a.md"] and library.version == 1
    other = add(library, "b.md", "text")
    with pytest.raises(NameTaken):
        library.replace(other, prepared(library, "a.md", "text"))
    with pytest.raises(NoText):
        prepared(library, "empty.md", "# Only a heading\n")


def test_what_is_made_to_be_large_is_refused_or_cut(library: Library) -> None:
    with pytest.raises(NoText, match="makes more than 20000 passages"):
        prepared(library, "many.md", "# a\nb\n" * 30_000)
    of_one = prepared(library, "title.md", f"# {'a ' * 5000}\n\n" + "hay " * 2000)
    assert len(of_one.chunks) > 10 and all(len(chunk.title) <= 300 for chunk in of_one.chunks)


def test_pages_of_documents_join_to_all_of_them(library: Library) -> None:
    names = [f"{number}.md" for number in range(7)]
    for name in names:
        add(library, name, f"text of {name}")
    seen, after, more = [], None, True
    while more:
        page, more = library.records(limit=3, after=after)
        seen += [record.name for record in page]
        after = page[-1].key
    assert seen == names[::-1]
    with pytest.raises(KeyError):
        library.records(limit=3, after="doc-none")


def test_changes_are_the_last_of_each_document_in_order(library: Library) -> None:
    first, second, third = (add(library, f"{name}.md", f"text {name}") for name in "abc")
    library.replace(first, prepared(library, "a.md", "other text"))
    library.remove(second)
    changes = all_changes(library)
    assert changes.version == 5
    assert [(change.version, change.key) for change in changes.changes] == [(3, third), (4, first), (5, second)]
    assert changes.changes[-1].document is None
    assert [change.key for change in all_changes(library, since=4).changes] == [second]
    with_vectors = all_changes(library, vectors_since=3).changes
    assert [change.document is not None and change.document.vectors is not None for change in with_vectors] == [
        False, True, False,
    ]  # fmt: skip
    bounded = library.changes(0, vectors_since=0, max_bytes=1)
    assert len(bounded.changes) == 1 and bounded.version == 5, "one at least, and it is known that there are more"


def test_a_chunks_id_is_never_used_again(library: Library) -> None:
    key = add(library, "a.md", "text")
    library.remove(key)
    add(library, "b.md", "text")
    (_, change) = all_changes(library).changes
    assert change.document is not None and change.document.chunks[0][0] == 2 and change.document.id == 2


def test_it_is_the_same_when_it_is_opened_again(library: Library, embedder: Embedder, tmp_path: Path) -> None:
    add(library, "a.md", "An adult alpaca eats hay.")
    before = all_changes(library)
    after = all_changes(Library(tmp_path, embedder=embedder, chunking=CHUNKING))
    assert (after.library, after.version) == (before.library, before.version)
    (one, two) = (changes.changes[0].document for changes in (before, after))
    assert one is not None and two is not None and one.chunks == two.chunks
    np.testing.assert_array_equal(one.vectors, two.vectors)


def test_another_way_of_cutting_or_embedding_is_applied_to_all_documents(
    library: Library, embedder: Embedder, tmp_path: Path, tiny_embedder: Path
) -> None:
    words = " ".join(f"w{number}" for number in range(40))
    key = add(library, "a.txt", words)
    before = all_changes(library)
    recut = Library(tmp_path, embedder=embedder, chunking=ChunkingConfig(chunk_words=30, overlap_words=3))
    after = all_changes(recut)
    assert after.library != before.library and after.changes[0].key == key, "copies begin anew"
    assert [len(changes.changes[0].document.chunks) for changes in (before, after)] == [5, 2]  # type: ignore[union-attr]
    copy = tmp_path / "embedder"
    shutil.copytree(tiny_embedder, copy)
    tokenizer = next(copy.rglob("tokenizer.json"))
    tokenizer.write_text(tokenizer.read_text() + "\n")
    again = all_changes(Library(tmp_path, embedder=Embedder(str(copy)), chunking=CHUNKING))
    assert again.embedder_sha256 != before.embedder_sha256 and again.version == after.version + 1


def test_a_folder_that_is_not_there_and_a_damaged_file_are_told(tmp_path: Path, embedder: Embedder) -> None:
    with pytest.raises(UserError, match="no such folder on this machine"):
        Library(tmp_path / "none", embedder=embedder, chunking=CHUNKING)
    (tmp_path / FILE).write_bytes(b"not a database" * 1000)
    with pytest.raises(UserError, match=r"library\.sqlite' is damaged .*put a copy"):
        Library(tmp_path, embedder=embedder, chunking=CHUNKING)


def test_a_library_that_is_in_use_or_cannot_be_opened_is_not_called_damaged(
    library: Library, tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(file: Path) -> sqlite3.Connection:
        connection = connect(file)
        connection.execute("PRAGMA busy_timeout = 0")
        return connection

    monkeypatch.setattr(library_module, "connect", impatient)
    library._writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match=r"library\.sqlite' is in use by another process .*end that"):
        Library(tmp_path, embedder=embedder, chunking=CHUNKING)
    library._writer.execute("ROLLBACK")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / FILE).mkdir(parents=True)
    with pytest.raises(UserError, match=r"library\.sqlite' cannot be opened or written .*mend the access"):
        Library(elsewhere, embedder=embedder, chunking=CHUNKING)
    (elsewhere / FILE).rmdir()
    sqlite3.connect(elsewhere / FILE).execute("CREATE TABLE cats (name TEXT)").connection.close()
    with pytest.raises(UserError, match=r"library\.sqlite' holds no library .*move it away"):
        Library(elsewhere, embedder=embedder, chunking=CHUNKING)


def test_a_stored_document_of_too_many_passages_is_told_with_the_setting(
    library: Library, tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(library, "many.txt", " ".join(f"w{number}" for number in range(100)))
    monkeypatch.setattr(library_module, "MOST_CHUNKS", 15)
    smaller = ChunkingConfig(chunk_words=10, overlap_words=5)
    with pytest.raises(
        UserError, match=r"uploads\.chunk_words=10 .*more than 15 passages of 'many\.txt' .*choose longer"
    ):
        Library(tmp_path, embedder=embedder, chunking=smaller)
    assert all_changes(Library(tmp_path, embedder=embedder, chunking=CHUNKING)).version == 1, "nothing has changed"
    monkeypatch.setattr(library_module, "MOST_CHUNKS", 5)  # as if it were of an index, which has no bound
    assert all_changes(Library(tmp_path, embedder=embedder, chunking=smaller)).version == 2


def test_a_full_disk_refuses_changes_keeps_what_is_there_and_takes_more_when_there_is_room(library: Library) -> None:
    first = add(library, "first.md", "A llama guards the herd.")
    before = library.version
    (pages,) = library._writer.execute("PRAGMA page_count").fetchone()
    library._writer.execute(f"PRAGMA max_page_count = {pages}")
    long = "An adult alpaca eats two kilograms of hay each day. " * 500
    for _ in range(2):
        with pytest.raises(DiskFull, match="full"):
            add(library, "second.md", long)
    assert library.version == before and library.record(first) is not None
    library._writer.execute("PRAGMA max_page_count = 100000")
    add(library, "second.md", long)
    assert [record.name for record in library.records(limit=9)[0]] == ["second.md", "first.md"]


def test_threads_that_write_at_once_make_changes_one_after_the_other(library: Library) -> None:
    def work(name: str) -> None:
        for number in range(5):
            key = add(library, f"{name}-{number}.md", f"text of {name}")
            if number % 2:
                library.remove(key)

    threads = [threading.Thread(target=work, args=[name]) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert library.version == 4 * (5 + 2) and len(library.records(limit=100)[0]) == 4 * 3


_WRITE_UNTIL_KILLED = """
import sys
from pathlib import Path
from app.config.documents import ChunkingConfig
from app.retrieval.changes import Changes
from app.retrieval.chunking import Document
from app.retrieval.embedding import Embedder
from app.retrieval.library import Library

folder, embedder = sys.argv[1:]
library = Library(Path(folder), embedder=Embedder(embedder), chunking=ChunkingConfig(chunk_words=12, overlap_words=3))
text = "An adult alpaca eats two kilograms of hay each day, and more in a cold winter. " * 20
prepared = [library.prepared(Document(str(n), text), kind="text", num_bytes=1) for n in range(3)]
for number in range(100_000):
    documents = [
        library.prepared(Document(f"{number}-{part}", f"{number} {text}"), kind="text", num_bytes=1)
        for part in range(2)
    ]
    keys = library.add(documents)
    if number % 3 == 0:
        library.replace(keys[0], library.prepared(Document(f"{number}-0", "replaced"), kind="text", num_bytes=1))
    print(number, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 7, 20])
def test_a_kill_loses_nothing_that_was_acknowledged_and_leaves_no_half(
    tmp_path: Path, tiny_embedder: Path, embedder: Embedder, acknowledged: int
) -> None:
    command = [sys.executable, "-c", _WRITE_UNTIL_KILLED, str(tmp_path), str(tiny_embedder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(acknowledged):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    library = Library(tmp_path, embedder=embedder, chunking=CHUNKING)
    names = {record.name for record in library.records(limit=10**6)[0]}
    assert {f"{number}-{part}" for number in range(last + 1) for part in range(2)} <= names
    assert all({f"{name.split('-')[0]}-{part}" for part in range(2)} <= names for name in names)
    for number in range(0, last + 1, 3):
        (key,) = (record.key for record in library.records(limit=10**6)[0] if record.name == f"{number}-0")
        assert library.text(key) == "replaced"
    connection = sqlite3.connect(tmp_path / FILE)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.execute("INSERT INTO words (words) VALUES ('integrity-check')")  # the index of words fits the chunks
    assert (
        connection.execute("SELECT count(*) FROM chunks").fetchone()
        == connection.execute("SELECT count(*) FROM vectors").fetchone()
    )
