"""What the documents say to type, in blocks and in the text, read from Markdown. Knows no command's meaning."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [
        *(REPOSITORY / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(REPOSITORY / "docs").glob("*.md"),
        *(REPOSITORY / "app/assets").glob("*/README.md"),
        REPOSITORY / "benchmarks/REPORT.md",
    ]
)
PROGRAMS = ("pacos", "python", "ray", "serve", "make", "pip")
"""What begins a command in the text."""
ELLIPSIS = "…"

FENCE = re.compile(r"^(\s*)```(\w*)\s*$")
MARK = re.compile(r"^\s*<!-- not run: (.+?) -->\s*$")


@dataclass(frozen=True)
class Block:
    document: Path
    line: int
    """Where its first line stands, counted from 1."""
    language: str
    text: str
    not_run: str | None
    """Why none of it can be run by a test, if that is said before it."""


@dataclass(frozen=True)
class Command:
    where: str
    words: tuple[str, ...]
    not_run: str | None = None
    is_whole: bool = True
    """Else it stands in the text, where what everybody knows may be left out."""

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def blocks(document: Path) -> list[Block]:
    found, lines = [], document.read_text().splitlines()
    index, before = 0, ""
    while index < len(lines):
        fence = FENCE.match(lines[index])
        if fence:
            end = next(i for i in range(index + 1, len(lines)) if lines[i].strip() == "```")
            mark = MARK.match(before)
            text = "\n".join(line.removeprefix(fence[1]) for line in lines[index + 1 : end])
            found.append(Block(document, index + 2, fence[2], text, mark[1] if mark else None))
            index = end
        if lines[index].strip():
            before = lines[index]
        index += 1
    return found


def text_of(document: Path) -> str:
    """Without its blocks, whose lines are left empty."""
    kept, inside = [], False
    for line in document.read_text().splitlines():
        is_fence = FENCE.match(line) is not None or (inside and line.strip() == "```")
        kept.append("" if inside or is_fence else line)
        inside ^= is_fence
    return "\n".join(kept)


def commands() -> list[Command]:
    return [command for document in DOCUMENTS for command in commands_of(document)]


def commands_of(document: Path) -> Iterator[Command]:
    name = document.relative_to(REPOSITORY)
    for block in blocks(document):
        for offset, line in _logical_lines(block.text):
            typed = line.removeprefix("$ ") if line.startswith("$ ") else line if block.language == "bash" else None
            words = _words(typed) if typed is not None else []
            if words:
                yield Command(f"{name}:{block.line + offset}", tuple(words), block.not_run)
    text = text_of(document)
    for transcript in re.finditer(r"(?m)^    \$ (.+(?:\\\n.+)*)$", text):
        yield Command(f"{name}:{_line(text, transcript.start())}", tuple(_words(transcript[1].replace("\\\n", " "))))
    for span in re.finditer(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text):
        words = span[1].split()
        if words[0] in PROGRAMS and len(words) > 1:
            yield Command(f"{name}:{_line(text, span.start())}", tuple(_words(span[1])), is_whole=False)


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with what continues them: after a backslash, or until a quote is closed."""
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        first, line = index, lines[index]
        while line.endswith("\\") or (_is_open(line) and index + 1 < len(lines)):
            index += 1
            line = (
                f"{line.removesuffix(chr(92))} {lines[index].strip()}"
                if line.endswith("\\")
                else f"{line}\n{lines[index]}"
            )
        yield first, line
        index += 1


def _is_open(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


def _words(line: str) -> list[str]:
    """As a shell would part it, without a comment and without variables that are set for this command alone."""
    words = shlex.split(line, comments=True)
    while len(words) > 1 and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
