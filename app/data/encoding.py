"""Records to token ids with their loss mask, and what happens to those that are too long. Knows no files and no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from app.data.prompts import Segment, Template
from app.data.records import Record, Text
from app.data.tokenization import Tokenizer
from app.errors import UserError

Truncation = Literal["prompt", "response", "drop"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A document, in runs of neighbouring tokens that are all in the loss or all out of it."""

    input_ids: list[int]
    runs: list[tuple[int, bool]]
    """How many tokens, and whether they are in the loss."""
    is_cut: bool = False

    @property
    def loss_mask(self) -> list[bool]:
        """`loss_mask[i]` says whether predicting `input_ids[i]` counts in the loss."""
        return [in_loss for length, in_loss in self.runs for _ in range(length)]


@dataclass(frozen=True, slots=True)
class Unusable:
    """A record that gives nothing to train on: too long, all out of the loss, or refused by the template."""

    reason: str


_Part = tuple[list[int], bool]
"""Ids that are wholly in the loss, or wholly out of it."""


def encode_records(
    records: Sequence[Record],
    *,
    template: Template,
    tokenizer: Tokenizer,
    max_length: int,
    truncation: Truncation,
    is_canonical: bool = False,
) -> list[list[Tokens] | Unusable]:
    """The documents of each record: one, or several for a plain text that is longer than `max_length`.

    Segments are encoded apart and their ids joined: encoding the joined text would let BPE merge across a seam, and
    searching for the response's start in the ids is then wrong. An end of text follows each response and is in the
    loss, so that the model learns to stop. `is_canonical` is what the tokenizer says of itself; it is faster then.
    """
    segments = [_segments(template, record) for record in records]
    texts = [segment.text for of_record in segments if isinstance(of_record, list) for segment in of_record]
    encoded = iter(tokenizer.encode_batch(texts, is_canonical=is_canonical))
    documents: list[list[Tokens] | Unusable] = []
    for record, of_record in zip(records, segments, strict=True):
        if isinstance(of_record, Unusable):
            documents.append(of_record)
            continue
        parts = []
        for segment in of_record:
            ids = next(encoded)
            if segment.ends:
                ids.append(tokenizer.end_id)
            parts.append((ids, segment.in_loss))
        if isinstance(record, Text):
            documents.append(_windows(parts[0][0], max_length))
        else:
            document = _fit(parts, max_length, truncation)
            documents.append(document if isinstance(document, Unusable) else [document])
    return documents


def _segments(template: Template, record: Record) -> list[Segment] | Unusable:
    try:
        return template.segments(record)
    except UserError as refusal:  # a chat template may not know some roles, or their order
        return Unusable(str(refusal))


def _fit(parts: list[_Part], max_length: int, truncation: Truncation) -> Tokens | Unusable:
    if not any([ids and in_loss for ids, in_loss in parts]):
        return Unusable("all masked: nothing of it is in the loss")
    if _length(parts) <= max_length:
        return _join(parts)
    if truncation == "drop":
        return Unusable(f"longer than max_length={max_length}")
    kept = _first_exchanges(parts, max_length)
    if _length(kept) <= max_length:
        return _join(kept, is_cut=True)
    (prompt, _), (response, _) = kept[:2]
    if truncation == "prompt":
        prompt = _cut_middle(prompt, max(max_length - len(response), max_length // 4))
    if len(prompt) >= max_length:
        return Unusable(f"the prompt alone fills max_length={max_length}")
    # A response that loses its tail loses its end of text with it: no false ending is learned.
    return _join([(prompt, False), (response[: max_length - len(prompt)], True)], is_cut=True)


def _first_exchanges(parts: list[_Part], max_length: int) -> list[_Part]:
    """As many whole exchanges from a conversation's beginning as fit, at least one: no answer loses its context."""
    length, kept = 0, 0
    for index, (ids, in_loss) in enumerate(parts):
        length += len(ids)
        if in_loss and (length <= max_length or not kept):
            kept = index + 1
    return parts[:kept]


def _cut_middle(prompt: list[int], room: int) -> list[int]:
    """The prompt's beginning, where the instruction stands, and its end, which asks for the response."""
    if len(prompt) <= room:
        return prompt
    tail = room // 2
    return prompt[: room - tail] + prompt[len(prompt) - tail :]


def _windows(ids: list[int], max_length: int) -> list[Tokens]:
    """A text in pieces of `max_length`. The first token of each has nothing before it to be predicted from."""
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:  # the end of text alone has nothing to learn from
        pieces.pop()
    return [_join([(piece, True)]) for piece in pieces]


def _length(parts: Sequence[_Part]) -> int:
    return sum([len(ids) for ids, _ in parts])


def _join(parts: Sequence[_Part], *, is_cut: bool = False) -> Tokens:
    ids: list[int] = []
    for part, _ in parts:
        ids += part
    runs = [(len(part), in_loss) for part, in_loss in parts]
    length, in_loss = runs[0]
    if in_loss:  # nothing comes before the first token
        runs[:1] = [(1, False), (length - 1, True)]
    return Tokens(ids, runs, is_cut)
