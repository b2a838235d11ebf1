"""A question -> the passages of an index that come nearest to it. Knows no HTTP and no language model."""

from dataclasses import dataclass
from pathlib import Path

from app.errors import UserError
from app.retrieval.chunking import Chunk
from app.retrieval.embedding import Embedder, embedder_hash
from app.retrieval.folder import DOCUMENTS, VECTORS, Manifest, damaged, read_manifest
from app.retrieval.index import VectorIndex
from app.retrieval.store import Store


@dataclass(frozen=True)
class Passage:
    """Text from a document. It is data: nothing in it is to be fetched or obeyed."""

    document: str
    title: str
    chunk: int
    start: int
    end: int
    """Characters of the document, `end` excluded."""
    text: str
    score: float
    """Cosine similarity to the question, without what all passages of the index share; at most 1."""


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
        self._store = Store(folder / DOCUMENTS)

    def search(self, query: str, *, top_k: int) -> list[Passage]:
        """The `top_k` nearest passages, best first; none for a query without a single known word."""
        (vector,) = self.embedder.embed([query])
        if not vector.any():
            return []
        hits = self._vectors.search(vector, top_k=top_k)
        chunks = self._store.chunks([number for number, _ in hits])
        return [_passage(number, chunks[number], score) for number, score in hits]


def _embedder(folder: Path, manifest: Manifest) -> Embedder:
    """The embedder that made the index; another one's vectors would be compared without sense."""
    try:
        embedder = Embedder(manifest.embedder)
    except UserError as error:
        raise damaged(folder, f"its embedder is not to be had: {error}; put it back, or choose another") from None
    if embedder_hash(embedder.folder) != manifest.embedder_sha256:
        raise damaged(folder, f"its embedder {manifest.embedder!r} has changed since it was built")
    return embedder


def _passage(number: int, chunk: Chunk, score: float) -> Passage:
    return Passage(
        document=chunk.document,
        title=chunk.title,
        chunk=number,
        start=chunk.start,
        end=chunk.end,
        text=chunk.text,
        score=score,
    )
