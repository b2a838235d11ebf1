"""The retriever deployment: passages of an index for a question. Thin; the work is `app.retrieval`'s."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.config import RetrieverConfig
from app.config.base import SearchMode
from app.errors import UserError
from app.serving.messages import Embeddings, Refusal

if TYPE_CHECKING:
    from app.retrieval.embedding import Embedder
    from app.retrieval.search import Searcher

NO_INDEX = Refusal(
    404,
    "this server has no index to retrieve from; build one with `pacos index documents=FOLDER output=INDEX` and serve "
    "it with retriever.index=INDEX",
    code="retrieval_not_configured",
)


class RetrieverDeployment:
    def __init__(self, config: RetrieverConfig) -> None:
        self._config = config
        self._searcher = None if config.index is None else _opened(Path(config.index))
        self._embedder: Embedder | None = None
        self._loading = threading.Lock()

    async def search(self, question: str, top_k: int, mode: SearchMode | None = None) -> list[dict[str, Any]] | Refusal:
        """The fields of `app.retrieval.search.Passage`, best passage first."""
        if self._searcher is None:
            return NO_INDEX
        passages = await asyncio.to_thread(
            self._searcher.search, question, top_k=top_k, mode=mode or self._config.search
        )
        return [asdict(passage) for passage in passages]

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
                if self._searcher is not None and self._config.embedder is None:
                    self._embedder = self._searcher.embedder
                else:
                    from app.retrieval.embedding import Embedder

                    self._embedder = Embedder(self._config.embedder or "embedded")
            return self._embedder


def _opened(index: Path) -> "Searcher":
    from app.retrieval.search import Searcher

    return Searcher(index)
