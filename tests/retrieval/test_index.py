"""Vectors along a graph, in lists, and beside a file: each finds what the exact search over the same vectors finds."""

from pathlib import Path

import numpy as np
import pytest

from app.config.base import VectorKind
from app.retrieval.index import FLAT_UNTIL, HNSW_UNTIL, LiveVectors, VectorIndex, kind_for, write_vectors
from app.retrieval.vector_build import build_vectors

COUNT, WIDTH = 5000, 32
KINDS: list[VectorKind] = ["flat", "hnsw", "ivf_pq"]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(COUNT, seed=1)


@pytest.fixture(scope="module")
def questions() -> np.ndarray:
    return clustered(50, seed=2)


@pytest.fixture(scope="module")
def files(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[VectorKind, Path]:
    """Built in a process of its own, as a server does it; ids are not rows."""
    folder = tmp_path_factory.mktemp("vectors")
    for kind in KINDS:
        ids = 3 * np.arange(COUNT, dtype=np.int64) + 7
        build_vectors(folder / kind, vectors, ids=ids, kind=kind, threads=2)
    assert {file.name for file in folder.iterdir()} == set(KINDS), "nothing is left of the building"
    return {kind: folder / kind for kind in KINDS}


def clustered(count: int, *, seed: int) -> np.ndarray:
    centres = np.random.default_rng(0).standard_normal((100, WIDTH))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(100, size=count)] + 0.7 * random.standard_normal((count, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def exact(index: VectorIndex, vectors: np.ndarray, ids: np.ndarray, question: np.ndarray) -> list[int]:
    """By a plain product of what `index` compares."""
    scores = index.project(vectors) @ index.project(question[None])[0]
    return ids[np.argsort(-scores)[:10]].tolist()


def test_the_structure_follows_from_the_number_of_vectors() -> None:
    assert [kind_for(count) for count in (0, FLAT_UNTIL, FLAT_UNTIL + 1, HNSW_UNTIL, HNSW_UNTIL + 1)] == [
        "flat", "flat", "hnsw", "hnsw", "ivf_pq",
    ]  # fmt: skip
    assert kind_for(3, "hnsw") == "hnsw"


@pytest.mark.parametrize(("kind", "least"), [("flat", 1.0), ("hnsw", 0.98), ("ivf_pq", 0.95)])
def test_nearly_all_of_the_nearest_are_found_and_by_their_ids(
    files: dict[VectorKind, Path], vectors: np.ndarray, questions: np.ndarray, kind: VectorKind, least: float
) -> None:
    index = VectorIndex(files[kind])
    assert (index.kind, index.count, index.width) == (kind, COUNT, WIDTH)
    ids = 3 * np.arange(COUNT) + 7
    shares = []
    for question in questions:
        hits = index.search(question, top_k=10)
        assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)
        shares.append(len({number for number, _ in hits} & set(exact(index, vectors, ids, question))) / 10)
    assert np.mean(shares) >= least


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_gone_is_left_out_and_what_has_come_is_found(
    files: dict[VectorKind, Path], vectors: np.ndarray, questions: np.ndarray, kind: VectorKind
) -> None:
    base = VectorIndex(files[kind])
    live = LiveVectors.empty(WIDTH).rebased(base)
    random = np.random.default_rng(3)
    ids, kept = base.ids.copy(), vectors.copy()
    for step in range(3):
        gone = set(random.choice(ids, size=500, replace=False).tolist())
        come = clustered(200, seed=10 + step)
        new_ids = np.arange(200) + 100_000 + 1000 * step
        live = live.changed(gone=gone, ids=new_ids.tolist(), vectors=come)
        stay = ~np.isin(ids, list(gone))
        ids, kept = np.concatenate([ids[stay], new_ids]), np.concatenate([kept[stay], come])
        assert live.count == len(ids)
    shares = []
    for question in questions:
        found = {number for number, _ in live.search(question, top_k=10)}
        assert found <= set(ids.tolist())
        shares.append(len(found & set(exact(base, kept, ids, question))) / 10)
    assert np.mean(shares) >= (1.0 if kind == "flat" else 0.94)


def test_a_newer_file_takes_over_without_a_change_of_what_is_found(
    vectors: np.ndarray, questions: np.ndarray, tmp_path: Path
) -> None:
    write_vectors(tmp_path / "old", vectors[:3000])
    live = LiveVectors.empty(WIDTH).rebased(VectorIndex(tmp_path / "old"))
    live = live.changed(gone=range(100), ids=range(3000, 5000), vectors=vectors[3000:])
    write_vectors(tmp_path / "new", vectors[50:4000], ids=np.arange(50, 4000))
    newer = live.rebased(VectorIndex(tmp_path / "new")).without_absent(np.arange(100, 5000))
    assert newer.count == live.count == 4900
    for question in questions:
        old, new = ([number for number, _ in some.search(question, top_k=10)] for some in (live, newer))
        assert len(set(old) & set(new)) >= 8, "another projection, so a place may change"


def test_an_empty_file_finds_nothing(tmp_path: Path, questions: np.ndarray) -> None:
    write_vectors(tmp_path / "none", np.zeros((0, WIDTH), dtype=np.float32))
    assert VectorIndex(tmp_path / "none").search(questions[0], top_k=5) == []
    assert LiveVectors.empty(WIDTH).search(questions[0], top_k=5) == []


def test_a_building_that_fails_says_so_and_leaves_nothing(tmp_path: Path, vectors: np.ndarray) -> None:
    (tmp_path / "file").mkdir()  # where the file should be
    with pytest.raises(RuntimeError, match="building hnsw of 5000 vectors ended with"):
        build_vectors(tmp_path / "file", vectors, kind="hnsw", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
