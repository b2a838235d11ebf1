"""Instruction records: reading Alpaca-format files, and what makes a record valid. Knows no tokens and no Ray."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import UserError

# Alpaca writes "there is no input" in a dozen ways: <noinput>, No input., noinput, No input required.
_NO_INPUT = re.compile(r"\W*no[\s_-]?input( (is )?(required|needed|given|provided|necessary))?\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Record:
    instruction: str
    input: str
    output: str

    def content_hash(self) -> str:
        """The same for the same record for ever, whatever file, row or run it comes from."""
        joined = "\0".join((self.instruction, self.input, self.output))
        return hashlib.sha256(joined.encode("utf-8", errors="surrogatepass")).hexdigest()


def read_rows(source: str) -> Iterator[Any]:
    """The raw rows of a JSON array or JSON Lines file, in order, as parsed and not yet validated.

    Raises:
        UserError: the file is missing, empty, not UTF-8, not JSON, or a single JSON object.
    """
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"source={source!r}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"source={source!r} is a folder; name the file in it") from None
    except OSError as error:
        raise UserError(f"source={source!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"source={source!r}: byte {error.start} is not UTF-8; convert the file, "
            "for example with iconv -f LATIN1 -t UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"source={source!r} is empty")
    if text.lstrip().startswith("["):
        return iter(_parse_array(source, text))
    return _parse_lines(source, text)


def validate_row(row: Any) -> Record | str:
    """The record in `row`, or the reason why there is none."""
    if not isinstance(row, dict):
        return "not an object"
    for field in ("instruction", "output"):
        if field not in row:
            return f"{field}: missing"
    values: dict[str, str] = {}
    for field in ("instruction", "input", "output"):
        value = "" if row.get(field) is None else row[field]
        if not isinstance(value, str):
            return f"{field}: not text"
        if any("\ud800" <= character <= "\udfff" for character in value):
            return f"{field}: a lone surrogate, which is not valid Unicode"
        values[field] = value.strip()
    for field in ("instruction", "output"):
        if not values[field]:
            return f"{field}: empty"
    if _NO_INPUT.fullmatch(values["input"]):
        values["input"] = ""
    return Record(**values)


def is_held_out_hash(content_hash: str, *, fraction: float) -> bool:
    """Whether content belongs to validation: by its hash, so that copies never straddle the split."""
    return int(content_hash[:8], 16) < fraction * 2**32


def _parse_array(source: str, text: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"source={source!r}: line {error.lineno} is not valid JSON: {error.msg}") from None
    if not rows:
        raise UserError(f"source={source!r} holds an empty array")
    return rows


def _parse_lines(source: str, text: str) -> Iterator[Any]:
    lines = text.split("\n")  # not splitlines(), which also breaks at U+2028 inside a string
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == 1 and _is_one_object(text):
                raise UserError(
                    f"source={source!r} holds one JSON object where an array of records is due; "
                    "wrap it in [ ] or write one record a line"
                ) from None
            raise UserError(f"source={source!r}: line {number} is not valid JSON: {error.msg}") from None


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False
