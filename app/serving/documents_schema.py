"""The wire of `/v1/documents`: a document as JSON or as a file of a form, and what is told of it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from starlette.datastructures import UploadFile

from app.retrieval.chunking import LONGEST_TITLE
from app.retrieval.library import Record
from app.retrieval.reading import MEDIA_TYPES, File, Kind, kind_of
from app.serving.api_errors import ApiError
from app.serving.messages import Refusal
from app.serving.openai_schema import Text, Wire, WireRequest

_LONGEST_NAME = 255
_FORM = "multipart/form-data"
_MEDIA_TYPE: dict[Kind, str] = {
    "text": "text/plain",
    "markdown": "text/markdown",
    "html": "text/html",
    "pdf": "application/pdf",
}


_ONE_LINE = r"^[^\x00-\x1f\x7f]*$"
Name = Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME, pattern=_ONE_LINE)]
"""A label. No file is ever called so."""
Title = Annotated[str, Field(max_length=LONGEST_TITLE, pattern=_ONE_LINE)]


class DocumentRequest(WireRequest):
    name: Name
    """Another document's is refused."""
    text: Text
    title: Title = ""
    """Not given: the first heading, an HTML page's title, or the name."""
    content_type: Literal["text/plain", "text/markdown", "text/html"] | None = None
    """Not given: by the name's ending, else text/plain."""

    def to_file(self) -> File:
        kind = MEDIA_TYPES[self.content_type] if self.content_type else kind_of(self.name) or "text"
        return File(self.name, self.text.encode(), "text" if kind == "pdf" else kind, self.title)


class _FormFields(WireRequest):
    """What may stand beside the files of a form."""

    title: Title = ""


class _FormFile(Wire):
    name: Name


class Document(Wire):
    id: str
    """Stays the same when the document is replaced."""
    object: Literal["document"] = "document"
    name: str
    title: str
    content_type: str
    """Of the file; the text of text/html is kept as Markdown."""
    bytes: int
    """Of the file."""
    characters: int
    """Of the text, which a source's `start` and `end` count in."""
    chunks: int
    created_at: int
    updated_at: int
    version: int
    """Of the library with this document's last change; every change makes it greater."""


class DocumentList(Wire):
    object: Literal["list"] = "list"
    data: list[Document]
    """The newest first."""
    has_more: bool = False
    """Whether there are more, `after` the last one's id."""
    takes_documents: bool = True
    """Whether the server has a folder for them."""


class DocumentDeleted(Wire):
    id: str
    object: Literal["document"] = "document"
    deleted: Literal[True] = True


def described(record: Record) -> Document:
    return Document(
        id=record.key,
        name=record.name,
        title=record.title,
        content_type=_MEDIA_TYPE[record.kind],
        bytes=record.num_bytes,
        characters=record.num_characters,
        chunks=record.num_chunks,
        created_at=record.created_at,
        updated_at=record.updated_at,
        version=record.version,
    )


async def read_files(request: Request, *, max_files: int) -> list[File]:
    """What a request brings: one document as JSON, or the files of a form.

    Raises:
        ApiError, RequestValidationError: neither, or not as it should be.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == _FORM:
        return await _form_files(request, max_files)
    if media_type == "application/json":
        return [_validated_json(await request.body()).to_file()]
    message = f"send {_FORM} with files, or application/json with name and text"
    if not media_type:
        raise ApiError(Refusal(422, f"{message}, and its Content-Type", code="invalid_value"))
    raise ApiError(Refusal(415, f"{message}; not {media_type}", code="unsupported_media_type"))


async def _form_files(request: Request, max_files: int) -> list[File]:
    # any page may have its visitor's browser send a form, to a server on their own machine too; JSON it may not
    if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise ApiError(Refusal(403, "a page of another site may not upload documents", code="cross_site"))
    async with request.form(max_files=max_files, max_fields=10) as form:
        parts = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        fields = _validated(_FormFields, {name: value for name, value in form.items() if isinstance(value, str)})
        if not parts:
            raise ApiError(Refusal(422, "the form has no file", code="invalid_value", param="file"))
        if fields.title and len(parts) > 1:
            raise ApiError(Refusal(400, "title: is of one file, and there are more", "invalid_value", "title"))
        return [await _file(part, fields.title) for part in parts]


async def _file(part: UploadFile, title: str) -> File:
    name = _validated(_FormFile, {"name": part.filename or ""}).name
    kind = kind_of(name, part.content_type)
    if kind is None:
        known = ", ".join(_MEDIA_TYPE.values())
        message = f"{name}: {part.content_type or 'a file of this kind'} is not read; what is: {known}"
        raise ApiError(Refusal(400, message, code="unsupported_file", param="file"))
    return File(name, await part.read(), kind, title)


def _validated_json(body: bytes) -> DocumentRequest:
    try:
        return DocumentRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(_without_input(error)) from None


def _validated(model: Any, values: dict[str, Any]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(_without_input(error)) from None


def _without_input(error: ValidationError) -> Sequence[Any]:
    return error.errors(include_input=False, include_url=False)
