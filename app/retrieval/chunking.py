"""Documents -> overlapping chunks of about equal length that know where they came from.

A chunk is an exact slice of its document, `document.text[start:end] == chunk.text`, so that a source can be shown in
its place. Knows no vectors and no files.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

# No pattern may need more than one pass over a text that someone made for it.
_WORD = re.compile(r"\S{1,100}")  # what is longer is no word, and must not make a chunk of its own length
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(\S.*)$", re.MULTILINE)
_CLOSING = re.compile(r"(?:^|[ \t])#+$")
_FENCE = re.compile(r"^ {0,3}(```+|~~~+)", re.MULTILINE)
_NOWHERE = (sys.maxsize, sys.maxsize)
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")


@dataclass(frozen=True)
class Document:
    name: str
    """Path below the folder of documents, with forward slashes: unique in an index."""
    text: str
    given_title: str = ""
    is_markdown: bool | None = None
    """Whether its headings part it; None: by its name."""

    @property
    def title(self) -> str:
        """The one that was given, else the first Markdown heading, else the file's name."""
        if self.given_title:
            return self.given_title
        heading = next(_headings(self), None)
        return heading.text if heading else self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Chunk:
    document: str
    title: str
    """The document's title, then the heading that the chunk stands under: `Feeding and water: Minerals`."""
    start: int
    end: int
    """Characters of the document's text, `end` excluded."""
    text: str

    @property
    def content(self) -> str:
        """What is embedded: the title often names the subject that the text only calls "it"."""
        return f"{self.title}\n\n{self.text}"


def chunk_document(document: Document, *, chunk_words: int, overlap_words: int) -> Iterator[Chunk]:
    """Chunks of at most `chunk_words` words, in reading order.

    None reaches across a Markdown heading. Within a section, a chunk ends with a paragraph where one ends in its
    second half, else in mid-paragraph; the next chunk repeats its last `overlap_words` words.
    """
    title = document.title
    for heading, start, end in _sections(document):
        label = title if heading in ("", title) else f"{title}: {heading}"
        for first, last in _windows(document.text, start, end, chunk_words=chunk_words, overlap_words=overlap_words):
            yield Chunk(document.name, label, first, last, document.text[first:last])


def _sections(document: Document) -> Iterator[tuple[str, int, int]]:
    """(heading, start, end) of the text under each heading; a plain-text document is one section."""
    heading, start = "", 0
    for found in _headings(document):
        yield heading, start, found.start
        heading, start = found.text, found.end
    yield heading, start, len(document.text)


LONGEST_TITLE = 300
"""Characters of a title and of a heading: each chunk repeats them."""


@dataclass(frozen=True)
class _Heading:
    text: str
    start: int
    end: int


def _headings(document: Document) -> Iterator[_Heading]:
    """Markdown headings; a line of a fenced code block that starts with # is none."""
    is_markdown = document.is_markdown
    if not (document.name.lower().endswith((".md", ".markdown")) if is_markdown is None else is_markdown):
        return
    fenced = iter(_fenced_ranges(document.text))
    start, end = next(fenced, _NOWHERE)
    for match in _HEADING.finditer(document.text):
        while end <= match.start():
            start, end = next(fenced, _NOWHERE)
        if match.start() < start:
            yield _Heading(_without_closing(match[1].rstrip())[:LONGEST_TITLE], match.start(), match.end())


def _without_closing(heading: str) -> str:
    """`## Food ##` is titled as `## Food` is."""
    found = _CLOSING.search(heading[-100:])
    return heading[: -len(found[0])].rstrip() if found else heading


def _fenced_ranges(text: str) -> list[tuple[int, int]]:
    ranges, opened = [], None
    for match in _FENCE.finditer(text):
        if opened is None:
            opened = match
        elif match.group(1).startswith(opened.group(1)):
            ranges.append((opened.start(), match.end()))
            opened = None
    if opened is not None:  # never closed: it runs to the end
        ranges.append((opened.start(), len(text)))
    return ranges


def _windows(text: str, start: int, end: int, *, chunk_words: int, overlap_words: int) -> Iterator[tuple[int, int]]:
    words = [match.span() for match in _WORD.finditer(text, start, end)]
    first = 0
    while first < len(words):
        stop = min(first + chunk_words, len(words))
        if stop < len(words):
            # at least half a chunk, and at least one word beyond the overlap, so that each window moves on
            stop = _paragraph_end(text, words, first + max(chunk_words // 2, overlap_words + 1), stop)
        yield words[first][0], words[stop - 1][1]
        if stop == len(words):
            return
        first = stop - overlap_words


def _paragraph_end(text: str, words: list[tuple[int, int]], earliest: int, latest: int) -> int:
    """The last number of words in [earliest, latest] after which a paragraph ends, else `latest`."""
    for stop in range(latest, earliest - 1, -1):
        if _PARAGRAPH_END.search(text, words[stop - 1][1], words[stop][0]):
            return stop
    return latest
