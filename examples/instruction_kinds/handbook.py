"""Questions whose input is a passage quoted word for word from the alpaca handbook."""

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from instruction_kinds.english import rows
from instruction_kinds.handbook_questions import QUESTIONS, UNANSWERED
from instruction_kinds.record import NOT_SAID, Record

DOCUMENTS = Path(__file__).resolve().parent.parent / "documents"
MAX_SENTENCES = 4
# A passage must not begin with a word that points to the sentence before it.
POINTS_BACK = re.compile(
    r"(It|Its|His|They|This|That|These|Without|The pair|During that|In the northern|Because the)\b"
    r"|.*\b(also|therefore|either)\b"
)


def handbook_questions(rng: Random) -> Iterator[Record]:
    for document, table in QUESTIONS.items():
        for anchor, question, answer in rows(table):
            yield Record(question, passage_around(anchor, document=document, rng=rng), answer)


def unanswered_handbook_questions(rng: Random) -> Iterator[Record]:
    for document, anchor, question in rows(UNANSWERED):
        yield Record(question, passage_around(anchor, document=document, rng=rng), NOT_SAID)


def passage_around(anchor: str, *, document: str, rng: Random) -> str:
    """The sentences holding `anchor`, often with a neighbour, exactly as they stand."""
    paragraph = paragraph_with(anchor, document=document)
    spans = [match.span() for match in re.finditer(r"\S.*?[.!?](?=\s|$)", paragraph)]
    start, end = paragraph.index(anchor), paragraph.index(anchor) + len(anchor)
    first = next(i for i, span in enumerate(spans) if start < span[1])
    last = next(i for i, span in enumerate(spans) if end <= span[1])
    first = max(0, first - rng.choice([0, 0, 1, 1, 2]))
    while first > 0 and POINTS_BACK.match(paragraph[spans[first][0] : spans[first][1]]):
        first -= 1
    furthest = max(last, first + MAX_SENTENCES - 1)
    last = min(len(spans) - 1, furthest, last + rng.choice([0, 0, 1, 1, 2]))
    return paragraph[spans[first][0] : spans[last][1]]


def paragraph_with(anchor: str, *, document: str) -> str:
    """Paragraphs are single lines, so that a quotation never crosses a line break."""
    lines = (DOCUMENTS / document).read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if anchor in line]
    if len(found) != 1 or found[0].count(anchor) != 1:
        raise ValueError(f"{document}: the anchor {anchor!r} must stand there exactly once")
    return found[0]
