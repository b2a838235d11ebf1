"""The retriever deployment: passages for a question, of an index or of the documents that are uploaded. Thin; the work
is `app.retrieval`'s."""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from app.config import RetrieverConfig
from app.config.base import SearchMode
from app.errors import UserError
from app.serving.messages import Embeddings, Refusal, Retrieved
from app.serving.metrics import RetrieverMetrics

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from app.retrieval.changes import Changes
    from app.retrieval.embedding import Embedder
    from app.retrieval.replica import Follower
    from app.retrieval.reranking import Reranker
    from app.retrieval.search import Passage, Searcher

logger = logging.getLogger("ray.serve")

FOLLOW_EVERY_S = 0.5
"""How often each replica asks for changes. A change is promised to be found everywhere within two seconds."""
_ANSWER_WITHIN_S = 60.0
NO_INDEX = Refusal(
    404,
    "this server has no index to retrieve from; build one with `pacos index documents=FOLDER output=INDEX` and serve "
    "it with retriever.index=INDEX, or take documents with retriever.documents=FOLDER",
    code="retrieval_not_configured",
)


class RetrieverDeployment:
    def __init__(self, config: RetrieverConfig, documents: "DeploymentHandle | None" = None) -> None:
        """With `documents`, that deployment's library is searched, once this replica has a whole copy of it."""
        self._config = config
        self._embedder: Embedder | None = None
        self._loading = threading.Lock()
        self._following: _Following | None = None
        self._searcher: Searcher | Follower | None = None
        self._metrics = RetrieverMetrics()
        self._reranker = None if config.reranker is None else _loaded_reranker(config.reranker)
        if documents is not None:
            self._searcher = self._follow(documents)
        elif config.index is not None:
            self._searcher = _opened(Path(config.index))
            self._embedder = self._searcher.embedder if config.embedder is None else None
            self._metrics.set_documents(self._searcher.num_documents)

    async def search(self, question: str, top_k: int, mode: SearchMode | None = None) -> Retrieved | Refusal:
        if self._searcher is None:
            return NO_INDEX
        version = self._searcher.version  # before the search: what it finds may be newer, never older
        mode, started = mode or self._config.search, time.perf_counter()
        passages = await asyncio.to_thread(self._found, question, top_k, mode)
        self._metrics.searched(time.perf_counter() - started, mode=mode)
        return Retrieved(tuple(asdict(passage) for passage in passages), version)

    def _found(self, question: str, top_k: int, mode: SearchMode) -> "list[Passage]":
        assert self._searcher is not None
        if self._reranker is None:
            return self._searcher.search(question, top_k=top_k, mode=mode)
        passages = self._searcher.search(question, top_k=max(top_k, self._config.rerank), mode=mode)
        read, rest = passages[: self._config.rerank], passages[self._config.rerank :]
        return [*self._reranker.ranked(question, read), *rest][:top_k]

    async def embed(self, texts: Sequence[str], dimensions: int | None) -> Embeddings | Refusal:
        """A vector of length 1 for each of `texts`, of `dimensions` if that is how many the embedder has."""
        return await asyncio.to_thread(self._embed, texts, dimensions)

    def _embed(self, texts: Sequence[str], dimensions: int | None) -> Embeddings | Refusal:
        try:
            embedder = self._loaded()
        except UserError as error:
            return Refusal(503, str(error), code="embedder_unavailable")
        if dimensions not in (None, embedder.width):
            message = f"dimensions={dimensions}: this embedder's vectors have {embedder.width}, and cannot be cut"
            return Refusal(400, message, code="unsupported_parameter", param="dimensions")
        counts = embedder.count_tokens(texts)
        for number, count in enumerate(counts):
            if embedder.max_tokens is not None and count > embedder.max_tokens:
                message = f"input[{number}] has {count} tokens; this embedder reads {embedder.max_tokens}"
                return Refusal(400, message, code="context_length_exceeded", param="input")
        return Embeddings(embedder.embed(texts), sum(counts))

    def _loaded(self) -> "Embedder":
        """Loaded when first asked for: many servers never are, and it takes seconds."""
        with self._loading:
            if self._embedder is None:
                from app.retrieval.embedding import Embedder

                self._embedder = Embedder(self._config.embedder or "embedded")
            return self._embedder

    def _follow(self, documents: "DeploymentHandle") -> "Follower":
        from app.retrieval.embedding import Embedder
        from app.retrieval.replica import Follower
        from app.serving.documents import embedder_of

        self._embedder = Embedder(embedder_of(self._config))
        follower = Follower(_RemoteLibrary(documents), self._embedder)
        self._ending = threading.Event()
        self._following = _Following(follower, self._ending, self._metrics)
        self._following.start()
        self._following.first.wait()
        self.check_health()
        return follower

    def check_health(self) -> None:
        """Serve asks; a replica that cannot follow its documents any more is replaced."""
        if self._following is not None and self._following.mistake is not None:
            raise self._following.mistake

    def __del__(self) -> None:
        if hasattr(self, "_ending"):
            self._ending.set()


class _Following(threading.Thread):
    """Keeps a copy up with its library until `ending`."""

    def __init__(self, follower: "Follower", ending: threading.Event, metrics: RetrieverMetrics) -> None:
        super().__init__(name="documents", daemon=True)
        self.first = threading.Event()
        """There is a whole copy, or a mistake."""
        self.mistake: UserError | None = None
        self._follower = follower
        self._ending = ending
        self._metrics = metrics

    def run(self) -> None:
        failing = False
        had_all_at = time.monotonic()
        while True:
            started = time.monotonic()
            try:
                if self._follower.catch_up():
                    self._metrics.set_documents(self._follower.num_documents)
                self.first.set()
                failing = False
                had_all_at = started
            except UserError as error:
                self.mistake = error
                self.first.set()
                return
            except Exception as error:  # the library is away: what is here is searched until it is back
                if not failing:
                    logger.warning(f"documents: no changes to be had ({type(error).__name__}: {error}); trying on")
                failing = True
            self._metrics.set_copy(version=self._follower.num_changes, lag_s=time.monotonic() - had_all_at)
            if self._ending.wait(max(0.0, FOLLOW_EVERY_S - (time.monotonic() - started))):
                return


class _RemoteLibrary:
    """The `documents` deployment, from a thread without an event loop."""

    def __init__(self, documents: "DeploymentHandle") -> None:
        self._documents = documents

    def changes(self, since: int, vectors_since: int) -> "Changes":
        return self._documents.changes.remote(since, vectors_since).result(timeout_s=_ANSWER_WITHIN_S)

    def snapshot_piece(self, version: int, offset: int) -> bytes | None:
        return self._documents.snapshot_piece.remote(version, offset).result(timeout_s=_ANSWER_WITHIN_S)


def _loaded_reranker(name: str) -> "Reranker":
    from app.retrieval.reranking import Reranker

    return Reranker(name)


def _opened(index: Path) -> "Searcher":
    from app.retrieval.search import Searcher

    return Searcher(index)
