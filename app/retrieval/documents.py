"""A folder of files -> documents, and a list of the files that had to be left out, with the reason."""

from dataclasses import dataclass
from pathlib import Path

from app.config.documents import ReadingConfig
from app.errors import UserError
from app.retrieval.chunking import Document
from app.retrieval.reading import SUFFIXES, File, Unreadable, kind_of, read_file


@dataclass(frozen=True)
class Skipped:
    name: str
    reason: str


def read_documents(source: str, reading: ReadingConfig | None = None) -> tuple[list[Document], list[Skipped]]:
    """Every text, Markdown, HTML and PDF file of the folder `source` and its subfolders, or that one file, in order of
    their names. One whose name is not UTF-8 is left out.

    Hidden files and folders are passed over. Line ends become \\n, and a byte order mark goes.

    Raises:
        UserError: `source` is missing, holds no such file, or none that can be used.
    """
    documents, skipped = [], []
    for name, file in find_files(source):
        document = _read(name, file, reading or ReadingConfig())
        if isinstance(document, Document):
            documents.append(document)
        else:
            skipped.append(document)
    if not documents:
        first = skipped[0]
        raise UserError(f"documents={source!r}: no file can be used; {first.name}: {first.reason}")
    return documents, skipped


def find_files(source: str) -> list[tuple[str, Path]]:
    """(name, file) of all that `read_documents` would read; none is opened.

    Raises:
        UserError: `source` is missing, or holds no such file.
    """
    root = Path(source).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise UserError(f"documents={source!r}: no such folder or file")
    files = sorted((file.relative_to(root), file) for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
    found = [(name.as_posix(), file) for name, file in files if file.is_file() and not _is_hidden(name)]
    if not found:
        raise UserError(f"documents={source!r} holds none of {', '.join(SUFFIXES)}")
    return found


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _read(name: str, file: Path, reading: ReadingConfig) -> Document | Skipped:
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if shown != name:  # as it is, it could be neither stored nor printed
        return Skipped(shown, "its name is not UTF-8; rename it, for example with convmv -f LATIN1 -t UTF-8")
    try:
        return read_file(File(name, file.read_bytes(), kind_of(name) or "text"), reading)
    except Unreadable as error:
        return Skipped(name, str(error))
    except OSError as error:
        return Skipped(name, f"cannot be read: {error.strerror}")
