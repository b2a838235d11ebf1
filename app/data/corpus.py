"""Text to pretrain on: files -> documents -> token sequences. Knows no Ray and no model."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.data.chunks import read_rows
from app.data.records import FIELDS, Conversation, Instruction, Invalid, Record, RowReader, detect_format, split_of
from app.data.tokenization import Tokenizer
from app.errors import UserError

# Of a row that is no valid record: the fields of the common formats that hold text, in reading order.
_TEXT_FIELDS = ("instruction", "prompt", "context", "input", "output", "response", "completion", "text")
_READERS = {format: RowReader(format) for format in FIELDS}


@dataclass(frozen=True)
class Document:
    text: str
    content_hash: str
    """Of an instruction record, the record's own, so that pretraining holds out what fine-tuning holds out."""


def read_documents(source: str) -> Iterator[Document]:
    """Documents of one file: a record each for .json and .jsonl, a paragraph each for plain text.

    A record's text is its fields joined by blank lines, without any template: what comes of it is a plain language
    model, which fine-tuning then teaches the template.
    """
    if Path(source).suffix in (".json", ".jsonl"):
        for row in _rows(source):
            document = _document_of_row(row)
            if document is not None:
                yield document
        return
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"source={source!r} cannot be read as UTF-8 text: {error}") from None
    for paragraph in text.split("\n\n"):
        if paragraph.strip():
            yield _plain_document(paragraph.strip())


def split_documents(documents: Sequence[Document], *, validation_fraction: float) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts), duplicates removed."""
    unique = {document.content_hash: document.text for document in documents}
    train: list[str] = []
    validation: list[str] = []
    for content_hash, text in unique.items():
        split = split_of(content_hash, validation_fraction=validation_fraction)
        (validation if split == "validation" else train).append(text)
    if not train or not validation:
        raise UserError(
            f"{len(unique)} documents are too few to hold out validation_fraction={validation_fraction} of them"
        )
    return train, validation


class TokenStream:
    """Documents, each closed by end of text, cut into rows of equal length; a new order every epoch."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, *, row_length: int) -> None:
        self.row_length = row_length
        self._documents = [
            np.asarray([*ids, tokenizer.end_id], dtype=np.int32) for ids in tokenizer.encode_batch(texts)
        ]
        self.num_tokens = sum(map(len, self._documents))
        self.num_bytes = sum(len(text.encode()) for text in texts)
        if self.num_tokens < row_length:
            raise UserError(f"the text holds {self.num_tokens} tokens, too few for one row of {row_length}")

    @property
    def rows_per_epoch(self) -> int:
        return self.num_tokens // self.row_length

    def epoch(self, epoch: int, *, seed: int) -> np.ndarray:
        """int32 [rows_per_epoch, row_length]; the same for the same seed and epoch."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self._documents))
        tokens = np.concatenate([self._documents[index] for index in order])
        return tokens[: self.rows_per_epoch * self.row_length].reshape(-1, self.row_length)


def _rows(source: str) -> Iterator[Any]:
    path = Path(source)
    try:
        yield from read_rows(path, source=source)
    except FileNotFoundError:
        raise UserError(f"source={source!r}: no such file") from None
    except OSError as error:
        raise UserError(f"source={source!r} cannot be read: {error.strerror}") from None


def _document_of_row(row: Any) -> Document | None:
    """As `pacos prepare` reads it; of a row that it would leave out, the texts that there are."""
    format = detect_format([row])
    if format is None:
        return _document_of_fields(row)
    try:
        record, _ = _READERS[format].read(row)
    except Invalid:
        return _document_of_fields(row)
    return Document(_joined(_texts_of(record)), record.content_hash())


def _texts_of(record: Record) -> Sequence[str]:
    if isinstance(record, Instruction):
        return (record.instruction, record.input, record.output)
    if isinstance(record, Conversation):
        return [message.content for message in record.messages]
    return (record.text,)


def _document_of_fields(row: Any) -> Document | None:
    if not isinstance(row, dict):
        return None
    clean = _READERS["text"].clean
    text = _joined(clean(row[name], name, []) for name in _TEXT_FIELDS if isinstance(row.get(name), str))
    return _plain_document(text) if text else None


def _joined(texts: Iterable[str]) -> str:
    return "\n\n".join(stripped for text in texts if (stripped := text.strip()))


def _plain_document(text: str) -> Document:
    return Document(text, hashlib.sha256(text.encode()).hexdigest())
