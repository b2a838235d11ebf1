import json
import shutil
import sqlite3
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from app.errors import UserError
from app.retrieval import folder as index_folder
from app.retrieval.folder import DOCUMENTS, MANIFEST, VECTORS
from app.retrieval.index import MIN_CHUNKS, VectorIndex, write_vectors
from app.retrieval.search import Passage, Searcher, fused

Build = Callable[[Path, Path, dict[str, str]], None]
Texts = dict[str, str]


def test_the_passage_that_holds_the_question_comes_first_and_knows_its_place(index: Path, texts: Texts) -> None:
    passages = Searcher(index).search("a good fleece on the table", top_k=2)
    assert len(passages) == 2 and passages[0].score >= passages[1].score
    best = passages[0]
    assert (best.document, best.title) == ("shearing.md", "Shearing: The fleece")
    assert texts[best.document][best.start : best.end] == best.text
    assert 0 < best.score <= 1.0001


def test_each_way_of_searching_finds_what_it_can(index: Path) -> None:
    """Vectors of an untrained corpus know no stems; words do, and know nothing else."""
    searcher = Searcher(index)
    (first, *_) = searcher.search("guarding herds", top_k=3, mode="words")
    assert first.document == "guards.txt"
    assert searcher.search("xylophone", top_k=3, mode="words") == []
    dense = [passage.chunk for passage in searcher.search("hay", top_k=4, mode="dense")]
    assert sorted(dense) == [0, 1, 2, 3], "similarity has a place for every passage"
    (both, *_) = searcher.search("llamas will guard the herd from foxes", top_k=4)
    assert both.document == "guards.txt" and both.score == 1


@pytest.mark.parametrize("query", ['"', "a AND", "NEAR(", "text:", "x*", "-- '; DROP TABLE chunks", "(((", "^"])
def test_nothing_in_a_query_is_a_command(index: Path, query: str) -> None:
    Searcher(index).search(query, top_k=3)


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_words_are_found_however_their_accents_are_written(
    tmp_path: Path, tiny_embedder: Path, build: Build, stored: Literal["NFC", "NFD"], asked: Literal["NFC", "NFD"]
) -> None:
    build(tmp_path / "index", tiny_embedder, {"de.txt": unicodedata.normalize(stored, "Die Größe der Höcker")})
    found = Searcher(tmp_path / "index").search(unicodedata.normalize(asked, "Größe"), top_k=3, mode="words")
    assert [passage.document for passage in found] == ["de.txt"]


def test_ranks_are_fused_by_the_weights_of_their_lists() -> None:
    hits = fused({"dense": [7, 5], "words": [5, 9]}, weights={"dense": 1.0, "words": 2.0})
    assert [number for number, _ in hits] == [5, 9, 7]
    most = 3 / 61
    assert dict(hits) == pytest.approx({5: (1 / 62 + 2 / 61) / most, 9: 2 / 62 / most, 7: 1 / 61 / most})
    assert fused({"words": [4]}, weights={"words": 2.0}) == [(4, 1.0)]
    assert fused({"words": []}, weights={"words": 2.0}) == []


def test_top_k_beyond_the_index_gives_every_chunk_once(index: Path) -> None:
    passages = Searcher(index).search("hay", top_k=100)
    assert sorted(passage.chunk for passage in passages) == [0, 1, 2, 3]


def test_a_question_without_a_known_word_finds_nothing(index: Path) -> None:
    assert Searcher(index).search("漢字", top_k=3) == []
    assert Searcher(index).search("  ", top_k=3) == []


def test_threads_that_search_at_once_get_what_one_gets(index: Path) -> None:
    searcher = Searcher(index)
    expected = searcher.search("llamas guard the herd", top_k=3)
    answers: list[list[Passage]] = []
    threads = [
        threading.Thread(
            target=lambda: answers.extend(searcher.search("llamas guard the herd", top_k=3) for _ in range(20))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 80 and all(answer == expected for answer in answers)


def test_rebuilding_replaces_the_whole_index_and_an_open_one_goes_on(
    index: Path, tiny_embedder: Path, build: Build
) -> None:
    before = Searcher(index)
    build(index, tiny_embedder, {"new.txt": "A pair of llamas."})
    assert {passage.document for passage in Searcher(index).search("llamas", top_k=10)} == {"new.txt"}
    assert before.search("llamas will guard the herd from foxes", top_k=1)[0].document == "guards.txt"
    assert [file.name for file in index.parent.iterdir()] == ["index"]


def test_the_same_documents_give_the_same_index(index: Path, tiny_embedder: Path, build: Build, texts: Texts) -> None:
    before = Searcher(index).manifest
    build(index, tiny_embedder, texts)
    assert Searcher(index).manifest == before  # the hashes of its files among the rest


def test_a_build_that_dies_leaves_the_old_index(
    index: Path, tiny_embedder: Path, monkeypatch: pytest.MonkeyPatch, build: Build
) -> None:
    def die(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(index_folder, "build_vectors", die)
    with pytest.raises(KeyboardInterrupt):
        build(index, tiny_embedder, {"new.txt": "A pair of llamas."})
    assert Searcher(index).manifest.documents == 3
    monkeypatch.undo()
    build(index, tiny_embedder, {"new.txt": "A pair of llamas."})
    assert [file.name for file in index.parent.iterdir()] == ["index"]


def _full_database(*arguments: object) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("PRAGMA max_page_count = 1")
    connection.execute("CREATE TABLE documents (text TEXT)")


def _full_vectors(file: Path, vectors: np.ndarray, **settings: object) -> None:
    write_vectors(Path("/dev/full"), vectors)


@pytest.mark.parametrize(("part", "full"), [("write_store", _full_database), ("build_vectors", _full_vectors)])
def test_a_full_disk_is_told_and_the_old_index_stays(
    index: Path,
    tiny_embedder: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Build,
    part: str,
    full: Callable[..., None],
) -> None:
    """By the errors that SQLite and FAISS have for it."""
    monkeypatch.setattr(index_folder, part, full)
    with pytest.raises(UserError, match="index' cannot be written: .*free space"):
        build(index, tiny_embedder, {"new.txt": "A pair of llamas."})
    assert Searcher(index).manifest.documents == 3
    assert [file.name for file in index.parent.iterdir()] == ["index"]


def test_a_folder_that_is_no_index_is_never_replaced(
    tmp_path: Path, tiny_embedder: Path, build: Build, texts: Texts
) -> None:
    (tmp_path / "thesis.md").write_text("three years of work")
    with pytest.raises(UserError, match=r"holds 'thesis\.md', which is not ours"):
        build(tmp_path, tiny_embedder, texts)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / MANIFEST).write_text("of another kind of folder")
    (tmp_path / "data" / "train").mkdir()
    with pytest.raises(UserError, match=r"holds 'train', which is not ours"):
        build(tmp_path / "data", tiny_embedder, texts)
    with pytest.raises(UserError, match="is a file"):
        build(tmp_path / "thesis.md", tiny_embedder, texts)
    assert (tmp_path / "thesis.md").read_text() == "three years of work"


@pytest.mark.parametrize("name", [DOCUMENTS, VECTORS, MANIFEST])
def test_a_missing_file_is_named_with_the_remedy_and_the_remedy_works(
    index: Path, tiny_embedder: Path, name: str, build: Build, texts: Texts
) -> None:
    (index / name).unlink()
    with pytest.raises(UserError, match=rf"index='.*index': lacks {name}; build it again with `pacos index`"):
        Searcher(index)
    build(index, tiny_embedder, texts)
    assert Searcher(index).manifest.documents == 3


@pytest.mark.parametrize("name", [DOCUMENTS, VECTORS])
def test_a_changed_byte_is_noticed_before_the_file_is_opened(index: Path, name: str) -> None:
    content = bytearray((index / name).read_bytes())
    content[len(content) // 2] ^= 1
    (index / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} does not match its hash in manifest\.json"):
        Searcher(index)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": 1', b"\xff\xfe", b"[]"])
def test_a_damaged_manifest_is_an_error_with_the_remedy(index: Path, content: bytes) -> None:
    (index / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*`pacos index`"):
        Searcher(index)


def test_a_format_of_another_version_is_an_error(index: Path) -> None:
    manifest = json.loads((index / MANIFEST).read_text())
    (index / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="has format 99, but 2 is due"):
        Searcher(index)


def test_a_missing_folder_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder; build it with `pacos index`"):
        Searcher(tmp_path / "absent")


def test_an_embedder_that_changed_or_went_is_noticed(
    tmp_path: Path, tiny_embedder: Path, build: Build, texts: Texts
) -> None:
    embedder = tmp_path / "embedder"
    shutil.copytree(tiny_embedder, embedder)
    build(tmp_path / "index", embedder, texts)
    tokenizer = next(embedder.rglob("tokenizer.json"))
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(UserError, match=r"has changed since it was built; build it again with `pacos index`"):
        Searcher(tmp_path / "index")
    shutil.rmtree(embedder)
    with pytest.raises(UserError, match=r"index='.*index': its embedder is not to be had: .*no such folder"):
        Searcher(tmp_path / "index")


def test_what_every_chunk_shares_is_taken_out_of_a_large_index_only(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    own = random.standard_normal((MIN_CHUNKS, 64))
    vectors = own / np.linalg.norm(own, axis=1, keepdims=True) + 3.0  # 3 in every dimension: what they share
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    write_vectors(tmp_path / "large.faiss", vectors)
    write_vectors(tmp_path / "small.faiss", vectors[:-1])
    (_, (_, runner_up)) = VectorIndex(tmp_path / "small.faiss").search(vectors[0], top_k=2)
    assert runner_up > 0.99
    ((best, score), (_, runner_up)) = VectorIndex(tmp_path / "large.faiss").search(vectors[0], top_k=2)
    assert best == 0 and score == pytest.approx(1, abs=1e-4) and runner_up < 0.7
