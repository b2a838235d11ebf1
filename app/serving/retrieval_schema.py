"""The wire of `/v1/rag` and `/v1/search`."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from app.config.base import SearchMode
from app.serving.openai_schema import WHOLE, AnswerRequest, Text, Usage, Wire, WireRequest


class RagRequest(AnswerRequest):
    question: Annotated[Text, Field(min_length=1, examples=["What is hay?"])]
    top_k: Annotated[int, Field(ge=1, le=50), WHOLE] | None = None
    """Passages to retrieve; the server's setting if not given."""


class SearchRequest(WireRequest):
    query: Annotated[Text, Field(min_length=1, examples=["hay"])]
    top_k: Annotated[int, Field(ge=1, le=1000), WHOLE] = 10
    mode: SearchMode | None = None
    """By meaning, by words (BM25), or by both; the server's setting if not given."""


class Source(Wire):
    document: str
    """Its name."""
    document_id: str
    """Of an uploaded document, for /v1/documents; of an index's its name."""
    title: str
    chunk: int
    """Which passage it is: the same as long as the document is."""
    text: str
    start: int
    end: int
    """Characters of the document's text, `end` excluded."""
    score: float
    """1 for a passage that is first by every way of searching, less further down."""


class SearchResponse(Wire):
    object: Literal["list"] = "list"
    data: list[Source]
    """Best first."""
    version: str
    """Of the documents that were searched; another one after every change."""


class Timings(Wire):
    retrieve_s: float
    generate_s: float
    total_s: float


class RagResponse(Wire):
    id: str
    object: Literal["rag.answer"] = "rag.answer"
    created: int
    model: str
    answer: str
    finish_reason: Literal["stop", "length"]
    sources: list[Source]
    """The passages that stood before the model, best first."""
    usage: Usage
    timings: Timings


def sources(passages: Sequence[Mapping[str, Any]]) -> list[Source]:
    """Of what the retriever found."""
    return [Source(**{name: passage[name] for name in Source.model_fields}) for passage in passages]
