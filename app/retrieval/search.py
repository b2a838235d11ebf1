"""A question -> the passages that come nearest to it, by meaning, by words or by both. Knows no HTTP and no language
model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from app.config.base import SearchMode
from app.errors import UserError
from app.retrieval.embedding import Embedder, embedder_hash
from app.retrieval.folder import DOCUMENTS, VECTORS, Manifest, damaged, read_manifest
from app.retrieval.index import VectorIndex
from app.retrieval.store import Chunks, FoundChunk, open_store

LEXICAL_WEIGHT = 2.0
"""What a place in the list by words counts for, where one in the list by meaning counts 1. On Cranfield the embedded
embedder alone is well behind BM25 alone, and 2 beats both 1 and either alone (docs/retrieval.md)."""
DEPTH = 200
"""Places of each list that are looked at."""
_RANK_OFFSET = 60
"""Of reciprocal rank fusion, as its authors set it: it keeps the first few places from deciding everything."""


@dataclass(frozen=True)
class Passage:
    """Text from a document. It is data: nothing in it is to be fetched or obeyed."""

    document: str
    """Its name."""
    document_id: str
    """Of an uploaded document what /v1/documents calls it, of an index's its name."""
    title: str
    chunk: int
    """Its id in the index or library."""
    start: int
    end: int
    """Characters of the document, `end` excluded."""
    text: str
    score: float
    """1 for a passage that is first by every way of searching, less further down; above 0."""


class Vectors(Protocol):
    """A `VectorIndex` or `LiveVectors`."""

    def search(self, query: np.ndarray, *, top_k: int) -> list[tuple[int, float]]: ...


class Searcher:
    """An open index; `search` may be called from several threads.

    It goes on reading the index that it opened, also after a new one has taken its place; open a new Searcher for it.

    Raises:
        UserError: the folder is not a complete index, is damaged, or its embedder is missing or has changed.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        self.embedder = _embedder(folder, self.manifest)
        try:
            self._vectors = VectorIndex(folder / VECTORS)
        except RuntimeError as error:
            raise damaged(folder, f"FAISS cannot read {VECTORS} ({error})") from None
        self._chunks = open_store(folder / DOCUMENTS)

    @property
    def version(self) -> str:
        """Another one for other documents."""
        return self.manifest.documents_sha256

    @property
    def num_documents(self) -> int:
        """How many are searched."""
        return self.manifest.documents

    def search(self, query: str, *, top_k: int, mode: SearchMode = "hybrid") -> list[Passage]:
        """As `search_passages`."""
        return search_passages(query, self.embedder, self._vectors, self._chunks, top_k=top_k, mode=mode)


def search_passages(
    query: str, embedder: Embedder, vectors: Vectors, chunks: Chunks, *, top_k: int, mode: SearchMode
) -> list[Passage]:
    """The `top_k` nearest passages, best first; none for a query without a single known word.

    `dense` goes by the embeddings' similarity, `words` by BM25; `hybrid` puts both lists together.
    """
    depth = max(DEPTH, top_k)
    ranked: dict[str, Sequence[int]] = {}
    if mode != "words":
        ranked["dense"] = _by_meaning(query, embedder, vectors, depth)
    if mode != "dense":
        ranked["words"] = chunks.search(query, top_k=depth)
    hits = fused(ranked, weights={"dense": 1.0, "words": LEXICAL_WEIGHT})[:top_k]
    found = chunks.get([number for number, _ in hits])
    # one that is not found has gone in this very moment
    return [_passage(number, found[number], score) for number, score in hits if number in found]


def _by_meaning(query: str, embedder: Embedder, vectors: Vectors, top_k: int) -> list[int]:
    (vector,) = embedder.embed([query])
    if not vector.any():
        return []
    return [number for number, _ in vectors.search(vector, top_k=top_k)]


def fused(ranked: Mapping[str, Sequence[int]], *, weights: Mapping[str, float]) -> list[tuple[int, float]]:
    """(id, score) over several lists of ids, each best first, by reciprocal rank fusion (Cormack et al. 2009).

    The score of an id is the weighted sum of 1 / (60 + its place) over the lists, as a share of what being first in all
    of them would give. Equal scores keep the order of the ids.
    """
    scores: dict[int, float] = {}
    for name, ids in ranked.items():
        for place, number in enumerate(ids, start=1):
            scores[number] = scores.get(number, 0.0) + weights[name] / (_RANK_OFFSET + place)
    most = sum(weights[name] for name in ranked) / (_RANK_OFFSET + 1)
    return sorted(((number, score / most) for number, score in scores.items()), key=lambda hit: (-hit[1], hit[0]))


def _embedder(folder: Path, manifest: Manifest) -> Embedder:
    """The embedder that made the index; another one's vectors would be compared without sense."""
    try:
        embedder = Embedder(manifest.embedder)
    except UserError as error:
        raise damaged(folder, f"its embedder is not to be had: {error}; put it back, or choose another") from None
    if embedder_hash(embedder.folder) != manifest.embedder_sha256:
        raise damaged(folder, f"its embedder {manifest.embedder!r} has changed since it was built")
    return embedder


def _passage(number: int, chunk: FoundChunk, score: float) -> Passage:
    return Passage(
        document=chunk.document,
        document_id=chunk.document_id,
        title=chunk.title,
        chunk=number,
        start=chunk.start,
        end=chunk.end,
        text=chunk.text,
        score=score,
    )
