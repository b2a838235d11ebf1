"""Vectors of chunks in a FAISS file, found again by inner product. Knows no texts.

A file is written once and then only read: adding while searching would crash FAISS (faiss #1781). What changes after it
was written lies beside it, in `LiveVectors`.
"""

import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from app.config.base import VectorKind

COMMON_DIRECTIONS = 2
MIN_CHUNKS = 20
"""In a smaller index the strongest directions are single chunks rather than what all of them share."""
FLAT_UNTIL = 50_000
"""Vectors that `auto` compares one by one: exact, 10 ms a question on one core (docs/retrieval.md)."""
HNSW_UNTIL = 2_000_000
"""Beyond, `auto` takes IVF-PQ: a graph keeps every vector whole, 2.3 KB each of 512 dimensions, in every replica."""
_NEIGHBOURS, _BUILD_EFFORT, _SEARCH_EFFORT = 32, 40, 256
"""HNSW's M, efConstruction and efSearch (Malkov and Yashunin 2016)."""
_LISTS_SEARCHED, _REFINED = 128, 10
"""IVF-PQ's nprobe, and how many times `top_k` candidates are compared once more by their 8-bit vectors."""
_TRAINING_PER_LIST = 64


def kind_for(count: int, kind: VectorKind = "auto") -> VectorKind:
    """Which structure `count` vectors get."""
    if kind != "auto":
        return kind
    return "flat" if count <= FLAT_UNTIL else "hnsw" if count <= HNSW_UNTIL else "ivf_pq"


def write_vectors(
    file: Path,
    vectors: np.ndarray,
    *,
    ids: np.ndarray | None = None,
    kind: VectorKind = "flat",
    threads: int | None = None,
) -> None:
    """Save float32 unit `vectors` [chunks, width]; a vector's id is its row, or that row of int64 `ids`.

    The directions that nearly all chunks share are taken out of them, and later out of each query: in a handbook on
    alpacas, "alpaca" tells no chunk from another (Arora et al. 2017; Mu and Viswanath 2018, "All-but-the-Top"). The
    file holds this projection in front of the vectors, so that no search can forget it.

    `threads` need a process of their own, in which torch is not loaded; None: one, beside torch.
    """
    faiss = _faiss(threads)
    width = vectors.shape[1]
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    index = faiss.IndexPreTransform(empty_index(faiss, kind_for(len(vectors), kind), len(vectors), width))
    index.prepend_transform(faiss.NormalizationTransform(width, 2.0))
    projection = faiss.LinearTransform(width, width)
    faiss.copy_array_to_vector(without_common(vectors).ravel(), projection.A)
    projection.is_trained = True
    index.prepend_transform(projection)
    if not index.is_trained:
        index.train(vectors)
    by_id = faiss.IndexIDMap(index)
    by_id.add_with_ids(vectors, np.arange(len(vectors), dtype=np.int64) if ids is None else ids)
    faiss.write_index(by_id, str(file))


def empty_index(faiss: ModuleType, kind: VectorKind, count: int, width: int) -> Any:
    """A FAISS index by inner product for `count` vectors of `width`."""
    if kind == "flat" or (kind == "ivf_pq" and count < _TRAINING_PER_LIST):
        return faiss.IndexFlatIP(width)
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(width, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = _BUILD_EFFORT
        return graph
    lists = min(round(4 * count**0.5), count // _TRAINING_PER_LIST)
    codes = next(number for number in (width // 8, width // 4, width // 2, width) if width % number == 0)
    bits = 8 if count >= 256 * 39 else 4  # k-means wants 39 vectors for each of its centres
    index = faiss.index_factory(width, f"IVF{lists},PQ{codes}x{bits},Refine(SQ8)", faiss.METRIC_INNER_PRODUCT)
    coarse = faiss.downcast_index(index.base_index)
    coarse.cp.max_points_per_centroid = _TRAINING_PER_LIST
    return index


def search_parameters(faiss: ModuleType, index: Any, *, top_k: int, selector: Any = None, effort: int = 0) -> Any:
    """How thoroughly `index` is searched. Of this search alone: set on the index, it would be everyone's.

    `effort`, unless 0, in place of the usual one: places that HNSW keeps in mind, lists that IVF-PQ looks through.
    """
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=max(effort or _SEARCH_EFFORT, top_k))
    if isinstance(index, faiss.IndexRefine):
        lists = faiss.SearchParametersIVF(sel=selector, nprobe=effort or _LISTS_SEARCHED)
        return faiss.IndexRefineSearchParameters(k_factor=float(_REFINED), base_index_params=lists)
    return faiss.SearchParameters(sel=selector)


def without_common(vectors: np.ndarray) -> np.ndarray:
    """float32 [width, width]: the projection away from the strongest directions of `vectors` [chunks, width]."""
    if len(vectors) < MIN_CHUNKS:
        return np.eye(vectors.shape[1], dtype=np.float32)
    covariance = np.zeros((vectors.shape[1], vectors.shape[1]))
    for part in np.array_split(vectors, len(vectors) // 100_000 + 1):  # not all of them as float64 at once
        covariance += part.T.astype(np.float64) @ part
    _, directions = np.linalg.eigh(covariance)  # [width, width], the strongest last
    common = directions[:, -COMMON_DIRECTIONS:]
    return (np.eye(vectors.shape[1]) - common @ common.T).astype(np.float32)


class VectorIndex:
    """Reading, from any thread, of a file that `write_vectors` made and whose hash the caller has checked.

    Raises:
        RuntimeError: FAISS cannot read the file.
    """

    def __init__(self, file: Path) -> None:
        self._faiss = _faiss()
        self._file = self._faiss.read_index(str(file))  # owns all below
        transformed = self._faiss.downcast_index(self._file.index)
        self._index = self._faiss.downcast_index(transformed.index)
        projection = self._faiss.downcast_VectorTransform(transformed.chain.at(0))
        self.width: int = projection.d_in
        self._projection = self._faiss.vector_to_array(projection.A).reshape(self.width, self.width).copy()
        self.ids: np.ndarray = self._faiss.vector_to_array(self._file.id_map).copy()
        self.count: int = self._file.ntotal

    @property
    def kind(self) -> VectorKind:
        if isinstance(self._index, self._faiss.IndexHNSW):
            return "hnsw"
        return "ivf_pq" if isinstance(self._index, self._faiss.IndexRefine) else "flat"

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """`vectors` [any, width] without what all chunks share, as they are compared here."""
        projected = vectors.astype(np.float32) @ self._projection.T
        lengths = np.linalg.norm(projected, axis=1, keepdims=True)
        return projected / np.where(lengths > 0, lengths, 1)

    def search(self, query: np.ndarray, *, top_k: int, kept: np.ndarray | None = None) -> list[tuple[int, float]]:
        """(chunk id, cosine similarity) of the `top_k` nearest to `query` [width], best first.

        `kept`, packed bits [rows], least significant first: the only rows that are looked at.
        """
        selector = None if kept is None else self._faiss.IDSelectorBitmap(kept)
        top_k = min(top_k, self.count)
        if top_k == 0:
            return []
        parameters = search_parameters(self._faiss, self._index, top_k=top_k, selector=selector)
        scores, rows = self._index.search(self.project(query[None]), top_k, params=parameters)  # [1, top_k] each
        found = rows[0] >= 0
        return list(zip(self.ids[rows[0][found]].tolist(), scores[0][found].tolist(), strict=True))


class LiveVectors:
    """A file's vectors, without those that have gone since it was written, and with those that have come.

    Never changed: a change gives a new one, so that searches go on without a lock. What has come is compared one by
    one, exactly; so a file has to be written anew before that is much.
    """

    def __init__(
        self,
        base: VectorIndex | None,
        *,
        gone: frozenset[int],
        ids: np.ndarray,
        vectors: np.ndarray,
        compared: np.ndarray,
    ) -> None:
        """`gone` are ids of `base` that are left out; `ids` [new] and `vectors` [new, width] are what has come, and
        `compared` [new, width] the same as `base` projects them."""
        self._base = base
        self._gone = gone
        self._ids, self._vectors, self._compared = ids, vectors, compared
        self._kept = None if base is None or not gone else np.packbits(~_among(base.ids, gone), bitorder="little")

    @classmethod
    def empty(cls, width: int) -> "LiveVectors":
        none = np.zeros((0, width), dtype=np.float32)
        return cls(None, gone=frozenset(), ids=np.zeros(0, dtype=np.int64), vectors=none, compared=none)

    @property
    def count(self) -> int:
        return len(self._ids) + (0 if self._base is None else self._base.count - len(self._gone))

    def changed(self, *, gone: Collection[int], ids: Sequence[int], vectors: np.ndarray) -> "LiveVectors":
        """Without the ids `gone`, then with `vectors` [ids, width]."""
        stay = ~_among(self._ids, gone)
        left = frozenset() if self._base is None else frozenset(gone) - frozenset(self._ids[~stay].tolist())
        return LiveVectors(
            self._base,
            gone=self._gone | left,
            ids=np.concatenate([self._ids[stay], np.asarray(ids, dtype=np.int64)]),
            vectors=np.concatenate([self._vectors[stay], vectors]),
            compared=np.concatenate([self._compared[stay], self._projected(vectors)]),
        )

    def rebased(self, base: VectorIndex) -> "LiveVectors":
        """All of a newer file, and what has come that it has not."""
        new = ~np.isin(self._ids, base.ids)
        vectors = self._vectors[new]
        return LiveVectors(base, gone=frozenset(), ids=self._ids[new], vectors=vectors, compared=base.project(vectors))

    def without_absent(self, present: np.ndarray) -> "LiveVectors":
        """Of the file, the ids `present` alone."""
        if self._base is None:
            return self
        gone = frozenset(np.setdiff1d(self._base.ids, present).tolist())
        return LiveVectors(self._base, gone=gone, ids=self._ids, vectors=self._vectors, compared=self._compared)

    def search(self, query: np.ndarray, *, top_k: int) -> list[tuple[int, float]]:
        """(chunk id, cosine similarity) of the `top_k` nearest to `query` [width], best first."""
        hits = [] if self._base is None else self._base.search(query, top_k=top_k, kept=self._kept)
        if len(self._ids):
            scores = self._compared @ self._projected(query[None].astype(np.float32))[0]
            best = np.argsort(-scores, kind="stable")[:top_k]
            hits += zip(self._ids[best].tolist(), scores[best].tolist(), strict=True)
        return sorted(hits, key=lambda hit: -hit[1])[:top_k]

    def _projected(self, vectors: np.ndarray) -> np.ndarray:
        return vectors if self._base is None else self._base.project(vectors)


def _among(ids: np.ndarray, some: Collection[int]) -> np.ndarray:
    return np.isin(ids, np.fromiter(some, dtype=np.int64, count=len(some)))


def _faiss(threads: int | None = None) -> ModuleType:
    # FAISS and torch each bring an OpenMP runtime; torch's has to be there first, and one thread starts no second
    # pool of threads beside it, which can end in a segmentation fault (faiss #3401).
    if threads is None:
        importlib.import_module("torch")
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(threads or 1)
    return faiss
