"""`pacos index` on a cluster: documents -> chunks -> embeddings on Ray Data's actors -> an index folder.

Orchestration only: what a chunk, an embedding and an index are is app/retrieval's. Ray must be initialised.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app.config.schema import IndexConfig
from app.errors import UserError
from app.ray_cluster import thread_environment
from app.retrieval.chunking import Chunk, Document, chunk_document
from app.retrieval.documents import Skipped, read_documents
from app.retrieval.embedding import Embedder, embedder_hash
from app.retrieval.folder import Manifest, check_output, write_index

Progress = Callable[[int, int], None]


def build_index(config: IndexConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Build the index that `config` describes, and replace the one at `config.output` once it is complete.

    `progress(done, total)` is told of chunks as their embeddings come in. The summary holds `documents`, `chunks`,
    `skipped` (a list of `name: reason`), `seconds`, `width` and `output`.

    Raises:
        UserError: no usable document, an embedder that is not to be had, or an output folder that is not an index.
    """
    started = time.perf_counter()
    folder = Path(config.output).expanduser()
    check_output(folder)
    documents, skipped = read_documents(config.documents, config.reading)
    documents, chunks, without_text = _chunk(documents, config)
    embedder = Embedder(config.embedder)  # here too, so that a bad one is reported before workers start
    vectors = _embed(chunks, config, width=embedder.width, progress=progress or _silent)
    manifest = Manifest(
        embedder=config.embedder,
        embedder_sha256=embedder_hash(embedder.folder),
        width=embedder.width,
        documents=len(documents),
        chunks=len(chunks),
        chunk_words=config.chunk_words,
        overlap_words=config.overlap_words,
    )
    write_index(
        folder,
        documents=documents,
        chunks=chunks,
        vectors=vectors,
        manifest=manifest,
        kind=config.vectors,
        threads=config.workers.threads,
    )
    return {
        "documents": len(documents),
        "chunks": len(chunks),
        "skipped": [f"{file.name}: {file.reason}" for file in [*skipped, *without_text]],
        "seconds": round(time.perf_counter() - started, 3),
        "width": embedder.width,
        "output": str(folder),
    }


class EmbedActor:
    """One worker: loads the embedder once, then embeds the batches that it is given."""

    def __init__(self, embedder: str, device: str) -> None:
        self._embedder = Embedder(embedder, device=device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"id": batch["id"], "vector": self._embedder.embed(batch["content"].tolist())}


def _chunk(documents: Sequence[Document], config: IndexConfig) -> tuple[list[Document], list[Chunk], list[Skipped]]:
    """(documents that have chunks, their chunks, documents that are headings only)."""
    kept, chunks, skipped = [], [], []
    for document in documents:
        own = list(chunk_document(document, chunk_words=config.chunk_words, overlap_words=config.overlap_words))
        if own:
            kept.append(document)
            chunks.extend(own)
        else:
            skipped.append(Skipped(document.name, "no text below its headings"))
    if not chunks:
        raise UserError(f"documents={config.documents!r}: no file has text; {skipped[0].name}: {skipped[0].reason}")
    return kept, chunks, skipped


def _embed(chunks: Sequence[Chunk], config: IndexConfig, *, width: int, progress: Progress) -> np.ndarray:
    """float32 [chunks, width]; batches come back in any order, so each row carries its chunk's id."""
    vectors = np.zeros((len(chunks), width), dtype=np.float32)
    done = 0
    for batch in _embedded_batches(chunks, config):
        vectors[batch["id"]] = batch["vector"]
        done += len(batch["id"])
        progress(done, len(chunks))
    if done != len(chunks):
        raise RuntimeError(f"{done} of {len(chunks)} chunks came back from the workers")
    return vectors


def _embedded_batches(chunks: Sequence[Chunk], config: IndexConfig) -> Iterable[dict[str, np.ndarray]]:
    import ray.data

    workers = config.workers
    rows = [{"id": number, "content": chunk.content} for number, chunk in enumerate(chunks)]
    # A block goes to one worker at a time: several for each, and none smaller than a batch without need.
    blocks = max(1, min(4 * workers.count, len(rows) // config.batch_size))
    dataset = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        EmbedActor,
        fn_constructor_args=(config.embedder, "cuda" if workers.gpus else "cpu"),
        batch_size=config.batch_size,
        batch_format="numpy",
        # It starts with one worker and takes more as the cluster has room: a busy cluster slows it, not stops it.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers.count),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        runtime_env={"env_vars": thread_environment(workers)},
    )
    dataset.context.enable_progress_bars = False  # the caller shows progress
    return dataset.iter_batches(batch_size=None, batch_format="numpy")


def _silent(done: int, total: int) -> None:
    """For callers that do not ask for progress."""
