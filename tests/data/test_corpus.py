"""Files as documents for pretraining, which holds out what fine-tuning holds out."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from app.config.data import RecordFormat
from app.data.corpus import Document, read_documents
from app.data.records import Instruction, RowReader


def documents_of(tmp_path: Path, *rows: Any) -> list[Document]:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_documents(str(source)))


@pytest.mark.parametrize(
    ("format", "row", "text"),
    [
        ("alpaca", {"instruction": "a", "input": "No input", "output": "b", "text": "all of it"}, "a\n\nb"),
        ("dolly", {"instruction": "a", "context": "c", "response": "b", "category": "x"}, "a\n\nc\n\nb"),
        ("prompt_completion", {"prompt": "Q: a\nA:", "completion": " b\n"}, "Q: a\nA:\n\nb"),
        ("text", {"text": " a\nb\n"}, "a\nb"),
        ("chat", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a\n\nb"),
        ("chat", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b\ud800"}]},
         "a\n\nb\ufffd"),
    ],
)  # fmt: skip
def test_a_record_of_each_format_is_the_document_that_fine_tuning_knows_it_by(
    tmp_path: Path, format: RecordFormat, row: dict[str, Any], text: str
) -> None:
    record, _ = RowReader(format).read(row)
    assert documents_of(tmp_path, row) == [Document(text, record.content_hash())]


def test_of_a_row_that_is_no_record_the_texts_are_read(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "input": "b", "output": ""}, {"prompt": "half \ud800 of it"}, {"title": "a"}, 3]
    assert documents_of(tmp_path, *rows) == [
        Document(text, hashlib.sha256(text.encode()).hexdigest()) for text in ("a\n\nb", "half \ufffd of it")
    ]


def test_what_an_alpaca_record_is_in_a_corpus_does_not_change(tmp_path: Path) -> None:
    """The embedded base has been trained on such, and is held against what it has not read."""
    (document,) = documents_of(tmp_path, {"instruction": " a ", "input": "b", "output": "c\n"})
    assert document == Document("a\n\nb\n\nc", Instruction("a", "b", "c").content_hash())
