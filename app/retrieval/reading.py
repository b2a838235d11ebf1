"""A file's bytes -> a document. What is not plain text is read in a process of its own, under limits."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from app.config.documents import ReadingConfig
from app.retrieval.chunking import LONGEST_TITLE, Document

Kind = Literal["text", "markdown", "html", "pdf"]
SUFFIXES: dict[str, Kind] = {
    ".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html",
    ".xhtml": "html", ".pdf": "pdf",
}  # fmt: skip
MEDIA_TYPES: dict[str, Kind] = {
    "text/plain": "text",
    "text/markdown": "markdown",
    "text/html": "html",
    "application/xhtml+xml": "html",
    "application/pdf": "pdf",
}
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONUTF8", "TMPDIR")
_EXTRACT = Path(__file__).with_name("extract.py")


class Unreadable(Exception):
    """A file that gives no document; the message says why, without the file's name."""


@dataclass(frozen=True)
class File:
    """As it came."""

    name: str
    """It names the document, and nothing on any disk."""
    content: bytes
    kind: Kind
    title: str = ""
    """Empty: what the document itself says."""


def kind_of(name: str, media_type: str | None = None) -> Kind | None:
    """What a file is, by its name, else by its media type (`text/html; charset=…`); None where neither tells.

    Clients give `application/octet-stream` for many a file whose name is clear.
    """
    suffix = Path(name.lower()).suffix
    return SUFFIXES.get(suffix) or MEDIA_TYPES.get((media_type or "").partition(";")[0].strip().lower())


def read_file(file: File, limits: ReadingConfig) -> Document:
    """
    Raises:
        Unreadable: damaged, encrypted, without text, or beyond `limits`.
    """
    if file.kind in ("text", "markdown"):
        text, title = _decoded(file.content), ""
        if len(text) > limits.max_characters:
            raise Unreadable(f"holds more than {limits.max_characters} characters of text")
    else:
        text, title = _extracted(file.content, file.kind, limits)
    if not text.strip():
        hint = "; a scan has to go through OCR first" if file.kind == "pdf" else ""
        raise Unreadable(f"holds no text{hint}")
    return Document(file.name, text, given_title=file.title or title, is_markdown=file.kind in ("markdown", "html"))


def _decoded(content: bytes) -> str:
    try:
        return _clean(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"byte {error.start} is not UTF-8; convert it, for example with iconv -f LATIN1 -t UTF-8"
        ) from None


def _extracted(content: bytes, kind: Kind, limits: ReadingConfig) -> tuple[str, str]:
    seconds = int(limits.timeout_s) + 1
    numbers = (limits.max_characters, limits.max_pages, limits.max_memory_bytes, seconds)
    # -P: the folder of this file is no place to import from; its modules' names are common ones
    command = [sys.executable, "-P", str(_EXTRACT), kind, *map(str, numbers)]
    try:
        done = subprocess.run(
            command, input=content, capture_output=True, timeout=limits.timeout_s, check=False, env=_environment()
        )
    except subprocess.TimeoutExpired:
        raise Unreadable(f"takes more than {limits.timeout_s:g} s to be read") from None
    if done.returncode != 0:  # the kernel's or the interpreter's end of it, without a word from the program
        raise Unreadable(f"cannot be read within {limits.max_memory_bytes} bytes of memory and {seconds} s")
    answer = cast(dict[str, str], json.loads(done.stdout))
    if "refused" in answer:
        raise Unreadable(answer["refused"])
    return _clean(answer["text"]), " ".join(_clean(answer["title"]).split())[:LONGEST_TITLE]


def _environment() -> dict[str, str]:
    """What an interpreter needs to start, and none of the keys and tokens that are in a replica's environment."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


def _clean(text: str) -> str:
    """Plain line ends, and only what UTF-8 and SQLite can hold."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return text.encode("utf-8", "replace").decode("utf-8")
