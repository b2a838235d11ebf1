"""Copies of a library: what each finds after every change is what a fresh search over the library would find."""

import errno
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.config.base import VectorKind
from app.config.documents import ChunkingConfig
from app.errors import UserError
from app.retrieval import replica as replica_module
from app.retrieval import snapshots as snapshots_module
from app.retrieval.changes import Changes
from app.retrieval.chunking import Document
from app.retrieval.embedding import Embedder
from app.retrieval.library import Library
from app.retrieval.replica import Follower
from app.retrieval.snapshots import Snapshots

CHUNKING = ChunkingConfig(chunk_words=12, overlap_words=3)
WORDS = [
    "hay", "alpaca", "fleece", "shearing", "clippers", "llamas", "guard", "herd", "foxes", "stray", "dog", "field",
    "winter", "kilograms", "spring", "table",
]  # fmt: skip


class LocalSource:
    """A library in this process, asked as one elsewhere is; `max_bytes` small, so that every copy takes many rounds."""

    def __init__(self, library: Library, snapshots: Snapshots) -> None:
        self.library, self.snapshots = library, snapshots
        self.asked: list[tuple[int, int]] = []

    def changes(self, since: int, vectors_since: int) -> Changes:
        self.asked.append((since, vectors_since))
        return self.library.changes(since, vectors_since=vectors_since, max_bytes=2000)

    def snapshot_piece(self, version: int, offset: int) -> bytes | None:
        return self.snapshots.piece(version, offset)


@pytest.fixture
def embedder(tiny_embedder: Path) -> Embedder:
    return Embedder(str(tiny_embedder))


def open_source(folder: Path, embedder: Embedder, kind: VectorKind = "auto") -> LocalSource:
    folder.mkdir(exist_ok=True)
    library = Library(folder, embedder=embedder, chunking=CHUNKING)
    return LocalSource(library, Snapshots(library, kind=kind, threads=1))


@pytest.fixture
def source(tmp_path: Path, embedder: Embedder) -> LocalSource:
    return open_source(tmp_path / "documents", embedder)


def sentence(generator: random.Random, length: int) -> str:
    return " ".join(generator.choices(WORDS, k=length))


def put(library: Library, name: str, text: str, key: str | None = None) -> str:
    document = library.prepared(Document(name, text), kind="text", num_bytes=len(text))
    if key is None:
        return library.add([document])[0]
    assert library.replace(key, document)
    return key


def found(follower: Follower, query: str, **values: object) -> list[str]:
    return [passage.document for passage in follower.search(query, top_k=1000, **values)]  # type: ignore[arg-type]


def best_by_meaning(library: Library, query: str) -> set[int]:
    """Chunks at the highest similarity, over the vectors that the library holds, without any index."""
    changes = library.changes(0, vectors_since=0, max_bytes=10**9).changes
    documents = [change.document for change in changes if change.document is not None]
    ids = [chunk[0] for document in documents for chunk in document.chunks]
    vectors = np.concatenate([document.vectors for document in documents if document.vectors is not None])
    return {ids[row] for row in np.argsort(-(vectors @ library.embedder.embed([query])[0]))[:1]}


def test_what_is_added_replaced_and_removed_is_found_so(source: LocalSource, embedder: Embedder) -> None:
    follower = Follower(source, embedder)
    assert follower.catch_up() and found(follower, "hay") == []
    key = put(source.library, "hay.txt", "An adult alpaca eats hay each day.")
    other = put(source.library, "guards.txt", "A pair of llamas will guard the herd.")
    before = follower.version
    assert follower.catch_up() and follower.version != before
    (passage, *_) = follower.search("hay", top_k=2)
    assert (passage.document, passage.document_id, passage.title) == ("hay.txt", key, "hay.txt")
    text = source.library.text(key)
    assert text is not None and text[passage.start : passage.end] == passage.text
    put(source.library, "straw.txt", "It is cold in spring and winter.", key)
    source.library.remove(other)
    follower.catch_up()
    for mode in ("words", "dense", "hybrid"):
        assert set(found(follower, "spring winter", mode=mode)) == {"straw.txt"}
        assert set(found(follower, "llamas guard", mode=mode)) <= {"straw.txt"}
    assert found(follower, "llamas", mode="words") == []
    assert not follower.catch_up()


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_copy_from_any_moment_on_finds_what_the_library_has(
    tmp_path: Path, embedder: Embedder, kind: VectorKind
) -> None:
    """Forty random changes, with snapshots between; one copy follows them all, fresh ones begin on the way."""
    source = open_source(tmp_path / "documents", embedder, kind)
    generator = random.Random(5)
    follower = Follower(source, embedder)
    follower.catch_up()
    keys: dict[str, str] = {}
    for number in range(40):
        kind_of_change = generator.random()
        if keys and kind_of_change < 0.25:
            source.library.remove(keys.pop(generator.choice(sorted(keys))))
        elif keys and kind_of_change < 0.5:
            name = generator.choice(sorted(keys))
            put(source.library, name, sentence(generator, generator.randint(5, 60)), keys[name])
        else:
            keys[f"{number}.txt"] = put(source.library, f"{number}.txt", sentence(generator, generator.randint(5, 60)))
        if number % 12 == 0:
            source.snapshots.write_if_due()
        if number % 2 == 0:
            follower.catch_up()
        if number % 10 != 9:
            continue
        follower.catch_up()
        fresh = Follower(source, embedder)
        fresh.catch_up()
        queries = [sentence(generator, 3) for _ in range(3)]
        for copy in (follower, fresh):
            assert copy.version == f"{copy._replica.library}-{source.library.version}"  # type: ignore[union-attr]
            assert set(found(copy, " ".join(WORDS))) == set(keys), "every document, and no other"
            assert copy._replica.vectors.count == len(copy._replica.chunks.ids())  # type: ignore[union-attr]
        for query in queries:
            one, other = (copy.search(query, top_k=5, mode="words") for copy in (follower, fresh))
            assert one == other


def test_a_fresh_copy_takes_vectors_from_the_snapshot_and_the_rest_from_changes(
    source: LocalSource, embedder: Embedder
) -> None:
    for number in range(5):
        put(source.library, f"{number}.txt", f"{WORDS[number]} {WORDS[number + 5]}")
    assert source.snapshots.write_if_due() and not source.snapshots.write_if_due()
    put(source.library, "late.txt", "clippers")
    follower = Follower(source, embedder)
    follower.catch_up()
    assert (0, 5) in source.asked and all(vectors_since == 5 for _, vectors_since in source.asked[1:])
    assert found(follower, "clippers", mode="dense")[0] == "late.txt"
    for number in range(5):
        assert found(follower, f"{WORDS[number]} {WORDS[number + 5]}", mode="dense")[0] == f"{number}.txt"


def test_removed_chunks_of_the_snapshot_do_not_crowd_the_others_out(
    source: LocalSource, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 chunks of one document, more than are looked at, are nearer to the question than all others; then they go."""
    generator = random.Random(1)
    crowd = put(source.library, "crowd.txt", " ".join(["hay"] * 5000))
    for number in range(3):
        put(source.library, f"{number}.txt", f"hay {sentence(generator, 8)}")
    source.snapshots.write_if_due()
    follower = Follower(source, embedder)
    follower.catch_up()
    source.library.remove(crowd)
    fresh = Follower(source, embedder)
    for copy in (follower, fresh):
        copy.catch_up()
        assert sorted(found(copy, "hay", mode="dense")) == ["0.txt", "1.txt", "2.txt"]


def test_a_missing_or_broken_snapshot_is_noticed_and_made_again(
    source: LocalSource, embedder: Embedder, tmp_path: Path
) -> None:
    put(source.library, "hay.txt", "An adult alpaca eats hay.")
    source.snapshots.write_if_due()
    (file,) = (tmp_path / "documents").glob("vectors-*.faiss")
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-1] + b"x"), file.unlink):
        damage()
        follower = Follower(source, embedder)
        follower.catch_up()
        assert found(follower, "hay", mode="dense") == ["hay.txt"], "searched without it"
        reopened = open_source(tmp_path / "documents", embedder)
        assert reopened.library.snapshot() is None and reopened.snapshots.write_if_due()
        fresh = Follower(reopened, embedder)
        fresh.catch_up()
        assert fresh._replica._snapshot_version == 1 and found(fresh, "hay", mode="dense") == ["hay.txt"]  # type: ignore[union-attr]


def test_leftovers_of_a_killed_writer_and_old_snapshots_go(
    source: LocalSource, embedder: Embedder, tmp_path: Path
) -> None:
    folder = tmp_path / "documents"
    for number in range(4):
        put(source.library, f"{number}.txt", f"text {number}")
        source.snapshots.write_if_due()
    assert {file.name for file in folder.glob("*.faiss")} == {"vectors-3.faiss", "vectors-4.faiss"}
    (folder / ".vectors-9.faiss.123.tmp").write_text("half")
    (folder / ".build-x").mkdir()
    (folder / "vectors-9.faiss").write_text("no row knows it")
    open_source(folder, embedder)
    assert {file.name for file in folder.glob("*vectors*")} == {"vectors-3.faiss", "vectors-4.faiss"}
    assert not list(folder.glob(".build-*"))


@pytest.mark.parametrize("part", ["build_vectors", "file_sha256", "set_snapshots"])
def test_an_attempt_that_fails_leaves_no_file(
    source: LocalSource, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        if part == "build_vectors":
            (staging,) = (path for path in arguments if isinstance(path, Path))
            staging.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    put(source.library, "hay.txt", "An adult alpaca eats hay.")
    monkeypatch.setattr(source.library if part == "set_snapshots" else snapshots_module, part, fail)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            source.snapshots.write_if_due()
        assert not [file.name for file in (tmp_path / "documents").iterdir() if "vectors" in file.name]
    monkeypatch.undo()
    assert source.snapshots.write_if_due()


def test_a_copy_begins_anew_when_the_library_is_another_one(
    source: LocalSource, embedder: Embedder, tmp_path: Path
) -> None:
    put(source.library, "old.txt", "hay and hay")
    put(source.library, "older.txt", "hay")
    follower = Follower(source, embedder)
    follower.catch_up()
    another = open_source(tmp_path / "another", embedder)
    put(another.library, "new.txt", "hay")
    follower._source = another
    follower.catch_up()
    assert found(follower, "hay") == ["new.txt"]


def test_a_copy_with_another_embedder_is_refused(source: LocalSource, embedder: Embedder) -> None:
    put(source.library, "a.txt", "hay")
    changes = source.changes

    def of_another(since: int, vectors_since: int) -> Changes:
        return replace(changes(since, vectors_since), embedder_sha256="0")

    source.changes = of_another  # type: ignore[method-assign]
    with pytest.raises(UserError, match="embedded by another embedder"):
        Follower(source, embedder).catch_up()


def test_folders_of_copies_go_with_them_and_those_of_killed_processes_with_the_next(
    source: LocalSource, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "pacos-replica-left").mkdir()
    follower, other = Follower(source, embedder), Follower(source, embedder)
    follower.catch_up()
    other.catch_up()
    assert len(list(tmp_path.glob("pacos-replica-*"))) == 2, "one each, and none of nobody"
    assert not (tmp_path / "pacos-replica-left").exists()
    del follower, other
    assert not list(tmp_path.glob("pacos-replica-*"))


def test_the_nearest_by_meaning_is_the_exact_one(source: LocalSource, embedder: Embedder) -> None:
    """Below `MIN_CHUNKS` nothing is projected away: the copy's first hit is that of a plain product."""
    generator = random.Random(2)
    for number in range(15):
        put(source.library, f"{number}.txt", sentence(generator, 10))
        if number == 7:
            source.snapshots.write_if_due()
    follower = Follower(source, embedder)
    follower.catch_up()
    for _ in range(10):
        query = sentence(generator, 4)
        assert follower.search(query, top_k=1, mode="dense")[0].chunk in best_by_meaning(source.library, query)
