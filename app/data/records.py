"""Instruction records: their formats, and what makes one valid. Knows no files, no tokens and no Ray."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.config.data import RecordFormat
from app.data.chunks import Unreadable

# Alpaca writes "there is no input" in a dozen ways: <noinput>, No input., noinput, No input required.
_NO_INPUT = re.compile(r"\W*no[\s_-]?input( (is )?(required|needed|given|provided|necessary))?\W*", re.IGNORECASE)
_LONGEST_MARKER = 40

ROLES = ("system", "user", "assistant")
# as the ShareGPT files name them
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True, slots=True)
class Instruction:
    instruction: str
    input: str
    output: str

    def content_hash(self) -> str:
        """The same for the same record for ever, whatever file, row or run it comes from."""
        return _hash(self.instruction, self.input, self.output)


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant in turn, the assistant last."""

    messages: tuple[Message, ...]

    def content_hash(self) -> str:
        return _hash("conversation", *(part for message in self.messages for part in (message.role, message.content)))


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, all of it to be learned."""

    text: str

    def content_hash(self) -> str:
        return _hash(self.text)


Record = Instruction | Conversation | Text


class Invalid(Exception):
    """A row that holds no record; the message is the reason."""


FIELDS: dict[RecordFormat, tuple[str, ...]] = {
    "chat": ("messages",),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The fields that tell a format, the most telling first: a file may hold Alpaca's three and their text besides."""


@dataclass(frozen=True)
class RowReader:
    """Rows of one format to records. `fields` gives other names of the format's fields."""

    format: RecordFormat
    fields: Mapping[str, str] = field(default_factory=dict)
    special_tokens: tuple[str, ...] = ()
    """Texts that the tokenizer takes for its own marks; content must not hold them."""

    def read(self, row: Any) -> tuple[Record, list[str]]:
        """The record in `row`, and what was repaired in it.

        Raises:
            Invalid: there is none.
        """
        if isinstance(row, Unreadable):
            raise Invalid("not valid JSON")
        if not isinstance(row, dict):
            raise Invalid("not an object")
        repairs: list[str] = []
        return _READERS[self.format](self, row, repairs), repairs

    def text(self, row: Mapping[str, Any], name: str, repairs: list[str], *, required: bool = True) -> str:
        value = row.get(self.fields.get(name, name))
        if value is None:
            if required and self.fields.get(name, name) not in row:
                raise Invalid(f"{name}: missing")
            value = ""
        text = self.clean(value, name, repairs)
        if required and (not text or text.isspace()):
            raise Invalid(f"{name}: empty")
        return text

    def clean(self, value: Any, name: str, repairs: list[str]) -> str:
        if not isinstance(value, str):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise Invalid(f"{name}: not text")
            repairs.append(f"{name}: a number, taken as text")
            return str(value)
        if not value.isascii() and HALF_A_PAIR.search(value):
            repairs.append(f"{name}: half a surrogate pair, replaced")
            value = HALF_A_PAIR.sub("\ufffd", value)
        for token in self.special_tokens:
            if token in value:
                repairs.append(f"{name}: the tokenizer's {token}, removed")
                value = value.replace(token, " ")
        return value


HALF_A_PAIR = re.compile("[\ud800-\udfff]")
"""A surrogate without its other half: JSON can escape one, and no UTF-8 can hold it."""


def detect_format(rows: Iterable[Any], fields: Mapping[str, str] | None = None) -> RecordFormat | None:
    """The format that fits most of `rows` by the names of their fields; None where none fits any."""
    objects = [row for row in rows if isinstance(row, dict)]
    counts = {name: sum(_has(row, required, fields or {}) for row in objects) for name, required in FIELDS.items()}
    best = max(counts, key=lambda name: counts[name])  # the first of equals
    return best if counts[best] else None


def split_of(content_hash: str, *, validation_fraction: float, test_fraction: float = 0.0) -> str:
    """`train`, `validation` or `test`: by content alone, so that copies never straddle and a record never moves.

    Validation is taken from the low end of the hashes and test from the high one, so neither depends on the other.
    """
    place = int(content_hash[:8], 16) / 2**32
    if place < validation_fraction:
        return "validation"
    return "test" if place >= 1 - test_fraction else "train"


# --- formats ---


def _read_alpaca(reader: RowReader, row: dict[str, Any], repairs: list[str]) -> Record:
    return _instruction(reader, row, repairs, ("instruction", "input", "output"))


def _read_dolly(reader: RowReader, row: dict[str, Any], repairs: list[str]) -> Record:
    return _instruction(reader, row, repairs, ("instruction", "context", "response"))


def _instruction(reader: RowReader, row: dict[str, Any], repairs: list[str], names: Sequence[str]) -> Instruction:
    first, second, third = names
    instruction = reader.text(row, first, repairs).strip()
    input = reader.text(row, second, repairs, required=False).strip()
    output = reader.text(row, third, repairs).strip()
    if len(input) <= _LONGEST_MARKER and _NO_INPUT.fullmatch(input):
        repairs.append(f"{second}: a marker of no input, emptied")
        input = ""
    return Instruction(instruction, input, output)


def _read_prompt(reader: RowReader, row: dict[str, Any], repairs: list[str]) -> Record:
    # As written: white space where prompt and completion meet is the author's own.
    return Instruction(reader.text(row, "prompt", repairs), "", reader.text(row, "completion", repairs))


def _read_text(reader: RowReader, row: dict[str, Any], repairs: list[str]) -> Record:
    return Text(reader.text(row, "text", repairs))


def _read_chat(reader: RowReader, row: dict[str, Any], repairs: list[str]) -> Record:
    values = row.get(_messages_field(row, reader.fields))
    if values is None:
        raise Invalid("messages: missing")
    if not isinstance(values, list) or not values:
        raise Invalid("messages: not a list of messages")
    messages = [_message(reader, value, repairs) for value in values]
    while messages and messages[-1].role != "assistant":
        messages.pop()
        if messages:
            repairs.append("messages: an end without an answer, cut off")
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise Invalid("messages: no assistant's turn")
    if any(turn.role != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)):
        raise Invalid("messages: user and assistant do not take turns")
    return Conversation(tuple(messages))


def _message(reader: RowReader, value: Any, repairs: list[str]) -> Message:
    if not isinstance(value, dict):
        raise Invalid("messages: one is not an object")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else None
    if role not in ROLES:
        raise Invalid("messages: a role is none of system, user, assistant")
    text = reader.clean("" if content is None else content, f"{role}'s content", repairs).strip()
    if not text and role != "system":
        raise Invalid(f"messages: an empty {role}'s turn")
    return Message(role, text)


_READERS: dict[RecordFormat, Callable[[RowReader, dict[str, Any], list[str]], Record]] = {
    "alpaca": _read_alpaca,
    "dolly": _read_dolly,
    "prompt_completion": _read_prompt,
    "chat": _read_chat,
    "text": _read_text,
}


def _has(row: dict[str, Any], required: Sequence[str], fields: Mapping[str, str]) -> bool:
    if required == FIELDS["chat"]:
        return isinstance(row.get(_messages_field(row, fields)), list)
    return all(fields.get(name, name) in row for name in required)


def _messages_field(row: Mapping[str, Any], fields: Mapping[str, str]) -> str:
    return fields.get("messages") or ("conversations" if "messages" not in row else "messages")


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", errors="surrogatepass")).hexdigest()
