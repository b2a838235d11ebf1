"""The routes of `/v1/documents`."""

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from app.serving.answering import Answering
from app.serving.documents_schema import (
    Document,
    DocumentDeleted,
    DocumentList,
    DocumentRequest,
    described,
    read_files,
)

PATH = "/v1/documents"


_TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}}


def add_document_routes(api: FastAPI, answering: Answering, errors: dict[int | str, dict]) -> None:
    max_files = answering.config.retriever.uploads.max_files
    body = {"requestBody": _request_body()}

    @api.post(PATH, response_model=DocumentList, status_code=201, responses=errors, openapi_extra=body)
    async def add(request: Request) -> Response:
        """Add documents: one as JSON, or the files of a form (text, Markdown, HTML, PDF); all of them, or none. It
        answers once they are on the disk; they are found everywhere within two seconds."""
        records = await answering.documents("add", await read_files(request, max_files=max_files))
        return JSONResponse(DocumentList(data=list(map(described, records))).model_dump(), status_code=201)

    @api.get(PATH, response_model=DocumentList, responses=errors)
    async def listed(limit: Annotated[int, Query(ge=1, le=1000)] = 20, after: str | None = None) -> Response:
        """The documents, the newest first."""
        if answering.config.retriever.documents is None:  # who looks whether there are some need not see an error
            return JSONResponse(DocumentList(data=[], takes_documents=False).model_dump())
        records, has_more = await answering.documents("records", limit, after)
        return JSONResponse(DocumentList(data=list(map(described, records)), has_more=has_more).model_dump())

    @api.get(f"{PATH}/{{id}}", response_model=Document, responses=errors)
    async def one(id: str) -> Response:
        return JSONResponse(described(await answering.documents("record", id)).model_dump())

    @api.get(f"{PATH}/{{id}}/content", responses=errors | {200: _TEXT})
    async def content(id: str) -> Response:
        """The document's text, in whose characters a source's `start` and `end` count."""
        return PlainTextResponse(await answering.documents("text", id), headers={"X-Content-Type-Options": "nosniff"})

    @api.put(f"{PATH}/{{id}}", response_model=Document, responses=errors, openapi_extra=body)
    async def replace(id: str, request: Request) -> Response:
        """Put another text in a document's place; its id stays."""
        files = await read_files(request, max_files=1)
        return JSONResponse(described(await answering.documents("replace", id, files[0])).model_dump())

    @api.delete(f"{PATH}/{{id}}", response_model=DocumentDeleted, responses=errors)
    async def delete(id: str) -> Response:
        """Remove a document, its passages and what is known of its words."""
        await answering.documents("remove", id)
        return JSONResponse(DocumentDeleted(id=id).model_dump())


def _request_body() -> dict[str, Any]:
    form = {
        "type": "object",
        "required": ["file"],
        "properties": {
            "file": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}},
            "title": {"type": "string", "description": "Of the one file."},
        },
    }
    return {
        "required": True,
        "content": {
            "application/json": {"schema": DocumentRequest.model_json_schema()},
            "multipart/form-data": {"schema": form},
        },
    }
