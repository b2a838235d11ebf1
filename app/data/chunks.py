"""A JSON file cut into chunks of a number of records each, which tasks can read by themselves.

One pass over the bytes finds where records begin; memory holds a window, never the file. Knows nothing of what a
record means.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from app.errors import UserError

_WINDOW_BYTES = 4 << 20
_LARGEST_RECORD_BYTES = 256 << 20
_BETWEEN = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Chunk:
    """Records `first_row` … `first_row + num_rows - 1` of a file: its bytes from `start` to `end`."""

    source: str
    path: str
    first_row: int
    num_rows: int
    start: int
    end: int
    is_array: bool
    """Whether the bytes are parts of one JSON array, or a JSON value a line."""


@dataclass(frozen=True)
class Unreadable:
    """A line that is not JSON."""

    text: str


def cut(path: Path, *, source: str, rows_per_chunk: int) -> list[Chunk]:
    """The chunks of a JSON array or JSON Lines file, in order; `source` is its name in messages.

    Raises:
        UserError: the file is empty, not UTF-8, a damaged array, or a single JSON object.
    """
    with path.open("rb") as stream:
        bom = len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0
        stream.seek(bom)
        first = _first_character(stream)
        if not first:
            raise UserError(f"source={source!r} is empty")
        is_array = first == b"["
        stream.seek(bom)
        spans = _array_spans(stream, source) if is_array else _line_spans(stream, source)
        chunks: list[Chunk] = []
        while group := list(itertools.islice(spans, rows_per_chunk)):
            first_row, (start, _), (_, end) = len(chunks) * rows_per_chunk, group[0], group[-1]
            chunks.append(Chunk(source, str(path), first_row, len(group), start, end, is_array))
    if not chunks:
        raise UserError(f"source={source!r} holds an empty array")
    return chunks


def read_chunk(chunk: Chunk) -> list[Any]:
    """The chunk's rows as parsed, in order; `Unreadable` for a line that is not JSON."""
    with open(chunk.path, "rb") as stream:
        stream.seek(chunk.start)
        text = stream.read(chunk.end - chunk.start).decode()
    if chunk.is_array:
        return json.loads(f"[{text}]")
    return [_parse_line(line) for line in text.split("\n") if line.strip()]


def read_rows(path: Path, *, source: str | None = None) -> Iterator[Any]:
    """All rows of a file, in order. Raises as `cut`."""
    for chunk in cut(path, source=source or str(path), rows_per_chunk=1000):
        yield from read_chunk(chunk)


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return Unreadable(line)


def _first_character(stream: BinaryIO) -> bytes:
    while block := stream.read(4096):
        if stripped := block.lstrip():
            return stripped[:1]
    return b""


def _line_spans(stream: BinaryIO, source: str) -> Iterator[tuple[int, int]]:
    position = stream.tell()
    is_first = True
    for line in stream:  # ends at \n alone, unlike str.splitlines, which also breaks at U+2028 inside a string
        _check_utf8(line, source, offset=position)
        start, position = position, position + len(line)
        if line.strip():
            if is_first and isinstance(_parse_line(line.decode()), Unreadable):
                _refuse_one_object(stream, line, source)
                stream.seek(position)
            is_first = False
            yield start, position


def _refuse_one_object(stream: BinaryIO, first_line: bytes, source: str) -> None:
    """A pretty-printed object in place of records is a mistake that deserves a better word than "not JSON"."""
    try:
        value = json.loads(first_line + stream.read(_LARGEST_RECORD_BYTES))
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict):
        raise UserError(
            f"source={source!r} holds one JSON object where an array of records is due; wrap it in [ ] or write one "
            "record a line"
        )


def _array_spans(stream: BinaryIO, source: str) -> Iterator[tuple[int, int]]:
    """Where the elements of the array that `stream` holds lie, in bytes.

    The bytes are scanned as Latin-1, a character each: JSON's own characters are ASCII, and the decoder's positions
    are then those in the file.
    """
    scan = json.JSONDecoder().raw_decode
    offset, text, position = stream.tell(), "", 0  # `text` is the window, which begins at byte `offset`
    utf8 = codecs.getincrementaldecoder("utf-8")()
    is_ended, size = False, _WINDOW_BYTES

    def grow() -> None:
        nonlocal text, offset, position, is_ended, size
        block, undecoded = stream.read(size), len(utf8.getstate()[0])
        try:
            utf8.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(source, offset + len(text) - undecoded + error.start) from None
        text, offset, position = text[position:] + block.decode("latin-1"), offset + position, 0
        is_ended = not block
        if len(text) > _LARGEST_RECORD_BYTES:
            raise UserError(f"source={source!r}: the record at byte {offset} is larger than {_LARGEST_RECORD_BYTES}")

    def next_character() -> str:
        nonlocal position
        while True:
            position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]
            if position < len(text) or is_ended:
                return text[position : position + 1]
            grow()

    def damaged(message: str, where: int) -> UserError:
        line = _line_number(stream, where)
        return UserError(f"source={source!r}: line {line} is not valid JSON: {message}")

    next_character()
    position += 1  # the opening bracket
    is_first = True
    while True:
        character = next_character()
        if character == "]":
            position += 1
            if next_character():
                raise damaged("Extra data after the array", offset + position)
            return
        if not is_first:
            if character != ",":
                raise damaged("Expecting ',' or ']'", offset + position)
            position += 1
            next_character()
        is_first = False
        while True:
            try:
                _, end = scan(text, position)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(text) - 16 or error.msg.startswith("Unterminated string")
                if is_ended or not is_cut:
                    raise damaged(error.msg, offset + error.pos) from None
                end = len(text)
            except RecursionError:
                raise damaged("nested too deeply", offset + position) from None
            if end < len(text) - 3 or is_ended:  # at the window's end a number might go on, past "1", "1." or "1e-"
                break
            size = max(_WINDOW_BYTES, len(text))
            grow()
        size = _WINDOW_BYTES
        yield offset + position, offset + end
        position = end


def _check_utf8(line: bytes, source: str, *, offset: int) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(source, offset + error.start) from None


def _not_utf8(source: str, position: int) -> UserError:
    return UserError(
        f"source={source!r}: byte {position} is not UTF-8; convert the file, for example with iconv -f LATIN1 -t UTF-8"
    )


def _line_number(stream: BinaryIO, position: int) -> int:
    stream.seek(0)
    return 1 + stream.read(position).count(b"\n")
