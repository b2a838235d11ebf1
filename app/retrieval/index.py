"""Vectors of chunks in a FAISS file, found again by inner product. Knows no texts.

A flat index compares the query with every vector: exact, and fast enough up to about a million chunks. It is written
once and then only read; adding while searching would crash FAISS.
"""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np

COMMON_DIRECTIONS = 2
MIN_CHUNKS = 20
"""In a smaller index the strongest directions are single chunks rather than what all of them share."""


def write_vectors(file: Path, vectors: np.ndarray) -> None:
    """Save float32 unit `vectors` [chunks, width]; a vector's id is its row.

    The directions that nearly all chunks share are taken out of them, and later out of each query: in a handbook on
    alpacas, "alpaca" tells no chunk from another (Arora et al. 2017; Mu and Viswanath 2018, "All-but-the-Top"). The
    file holds this projection in front of the vectors, so that no search can forget it.
    """
    faiss = _faiss()
    width = vectors.shape[1]
    index = faiss.IndexPreTransform(faiss.IndexFlatIP(width))
    index.prepend_transform(faiss.NormalizationTransform(width, 2.0))
    projection = faiss.LinearTransform(width, width)
    faiss.copy_array_to_vector(without_common(vectors).ravel(), projection.A)
    projection.is_trained = True
    index.prepend_transform(projection)
    by_id = faiss.IndexIDMap(index)
    by_id.add_with_ids(np.ascontiguousarray(vectors, dtype=np.float32), np.arange(len(vectors), dtype=np.int64))
    faiss.write_index(by_id, str(file))


def without_common(vectors: np.ndarray) -> np.ndarray:
    """float32 [width, width]: the projection away from the strongest directions of `vectors` [chunks, width]."""
    if len(vectors) < MIN_CHUNKS:
        return np.eye(vectors.shape[1], dtype=np.float32)
    _, directions = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)  # [width, width], the strongest last
    common = directions[:, -COMMON_DIRECTIONS:]
    return (np.eye(vectors.shape[1]) - common @ common.T).astype(np.float32)


class VectorIndex:
    """Reading, from any thread, of a file that `write_vectors` made and whose hash the caller has checked.

    Raises:
        RuntimeError: FAISS cannot read the file.
    """

    def __init__(self, file: Path) -> None:
        self._index = _faiss().read_index(str(file))
        self.count: int = self._index.ntotal

    def search(self, query: np.ndarray, *, top_k: int) -> list[tuple[int, float]]:
        """(chunk id, cosine similarity) of the `top_k` nearest to `query` [width], best first."""
        scores, ids = self._index.search(query[None].astype(np.float32), min(top_k, self.count))  # [1, top_k] each
        return [(int(number), float(score)) for number, score in zip(ids[0], scores[0], strict=True) if number >= 0]


def _faiss() -> ModuleType:
    # FAISS and torch each bring an OpenMP runtime; torch's has to be there first, and one thread starts no second
    # pool of threads beside it, which can end in a segmentation fault (faiss #3401).
    importlib.import_module("torch")
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(1)
    return faiss
