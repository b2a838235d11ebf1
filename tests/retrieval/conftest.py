"""A tiny real embedder and a small index, made once: nothing here needs the network, Ray or the packaged assets."""

from collections.abc import Callable
from pathlib import Path

import pytest

from app.retrieval.chunking import Document, chunk_document
from app.retrieval.embedding import Embedder, embedder_hash
from app.retrieval.folder import Manifest, write_index
from app.retrieval.static_embedder import StaticEmbedderSettings, save_static_embedder, train_static_embedder

_TEXTS = {
    "feeding/hay.md": "# Hay\n\nAn adult alpaca eats two kilograms of hay each day, and more in a cold winter.\n",
    "shearing.md": "# Shearing\n\nShearing takes place once a year in spring, with electric clippers.\n\n"
    "## The fleece\n\nA good fleece weighs three kilograms and is sorted by hand on a table.\n",
    "guards.txt": "A pair of llamas will guard the herd from foxes. They chase a stray dog out of the field.\n",
}


@pytest.fixture(scope="session")
def tiny_embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a static model of 64 dimensions that knows the words of `texts`."""
    folder = tmp_path_factory.mktemp("embedder")
    texts = [text for text in _TEXTS.values() for _ in range(5)]
    settings = StaticEmbedderSettings(vocab_size=300, width=64, epochs=0, lexical=1.0)
    save_static_embedder(folder, *train_static_embedder(texts, [], settings=settings, log=lambda line: None))
    return folder


Build = Callable[[Path, Path, dict[str, str]], None]


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    return dict(_TEXTS)


@pytest.fixture(scope="session")
def build() -> Build:
    """`build(folder, embedder_folder, texts)` writes an index without Ray."""
    return _build


@pytest.fixture
def index(tmp_path: Path, tiny_embedder: Path) -> Path:
    """A fresh index of `texts`, to be searched or damaged."""
    folder = tmp_path / "index"
    _build(folder, tiny_embedder, _TEXTS)
    return folder


def _build(folder: Path, embedder_folder: Path, texts: dict[str, str]) -> None:
    embedder = Embedder(str(embedder_folder))
    documents = [Document(name, text) for name, text in texts.items()]
    chunks = [chunk for document in documents for chunk in chunk_document(document, chunk_words=30, overlap_words=5)]
    manifest = Manifest(
        embedder=str(embedder_folder),
        embedder_sha256=embedder_hash(embedder_folder),
        width=embedder.width,
        documents=len(documents),
        chunks=len(chunks),
        chunk_words=30,
        overlap_words=5,
    )
    vectors = embedder.embed([chunk.content for chunk in chunks])
    write_index(folder, documents=documents, chunks=chunks, vectors=vectors, manifest=manifest)
