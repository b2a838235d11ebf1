"""The retriever deployment: passages of an index for a question. Thin; the work is `app.retrieval`'s."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.config import RetrieverConfig
from app.serving.messages import Refusal

NO_INDEX = Refusal(
    404,
    "this server has no index to retrieve from; build one with `pacos index documents=FOLDER output=INDEX` and serve "
    "it with retriever.index=INDEX",
    code="retrieval_not_configured",
)


class RetrieverDeployment:
    def __init__(self, config: RetrieverConfig) -> None:
        self._searcher = None
        if config.index is not None:
            from app.retrieval.search import Searcher

            self._searcher = Searcher(Path(config.index))

    async def search(self, question: str, top_k: int) -> list[dict[str, Any]] | Refusal:
        """The fields of `app.retrieval.search.Passage`, best passage first."""
        if self._searcher is None:
            return NO_INDEX
        passages = await asyncio.to_thread(self._searcher.search, question, top_k=top_k)
        return [asdict(passage) for passage in passages]
