"""A program of its own: an HTML or PDF file on standard input -> its text, as one JSON object on standard output.

Files come from anyone, and a small one can be made to need all memory, or hours. So `app/retrieval/reading.py` runs
this apart, and the kernel holds it to its limits. Knows nothing of the rest of the application, and reads no
other file than Python's own and its packages'.

    python -P extract.py KIND MAX_CHARACTERS MAX_PAGES MAX_MEMORY_BYTES MAX_SECONDS

The object has `text` and `title`, or `refused`, the reason why there is no text.
"""

import io
import json
import logging
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

# what a page shows is its text; these hold none, or none of its own
_NOT_TEXT = ("title", "script", "style", "noscript", "template", "iframe", "object", "svg", "math", "nav")
_CONTROLS = ("button", "select", "option", "textarea")
_MAY_HOLD_ALL = ("head", "form")
"""A page whose </head> is left out stands in its head, and some pages stand in one form."""


class Refused(Exception):
    """The file cannot be used; the message says why."""


def main(arguments: list[str]) -> None:
    kind, max_characters, max_pages, max_memory_bytes, max_seconds = arguments[0], *map(int, arguments[1:])
    confine(max_memory_bytes, max_seconds)
    logging.disable()  # pypdf warns of every flaw of a file
    content = sys.stdin.buffer.read()
    try:
        text, title = _pdf(content, max_characters, max_pages) if kind == "pdf" else _html(content)
        answer = {"text": text, "title": title}
        if len(text) > max_characters:
            answer = {"refused": too_long(max_characters)}
    except Refused as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"refused": f"needs more than {max_memory_bytes} bytes of memory to be read"}
    except RecursionError:
        answer = {"refused": "is nested too deeply to be read"}
    except Exception as error:  # whatever a damaged file makes of the library that reads it
        answer = {"refused": f"is damaged ({type(error).__name__})"}
    sys.stdout.buffer.write(json.dumps(answer).encode())


def confine(max_memory_bytes: int, max_seconds: int) -> None:
    """For the rest of the process: no more than that, no network, no other process, nothing written, and nothing read
    but modules."""
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (max_seconds, max_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_refuse)


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_MODULES = tuple(os.path.realpath(folder) + os.sep for folder in (sys.prefix, sys.base_prefix, *sys.path) if folder)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """What a file asks of the libraries that read it. It holds Python code, as these are, and no machine code."""
    if event == "open":
        path, _, flags = arguments
        is_module = isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(_MODULES)
        if is_module and not flags & _WRITES:
            return
    elif event == "os.listdir" or not event.startswith(("os.", "socket.", "subprocess.", "shutil.", "tempfile.")):
        return
    raise PermissionError(event)


def too_long(max_characters: int) -> str:
    return f"holds more than {max_characters} characters of text"


def _html(content: bytes) -> tuple[str, str]:
    """As Markdown, so that headings part it as they do there; links and pictures are left out."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    page = BeautifulSoup(content, "html.parser")
    title = page.title.get_text(" ", strip=True) if page.title else ""
    for element in [*page(_NOT_TEXT), *(control for form in page("form") for control in form(_CONTROLS))]:
        element.decompose()
    for element in page(_MAY_HOLD_ALL):
        element.name = "div"  # parts what stands in it from what is around it
    converter = MarkdownConverter(heading_style="ATX", strip=["a", "img"], escape_asterisks=False,
                                  escape_underscores=False, escape_misc=False)  # fmt: skip
    return converter.convert_soup(page).strip(), title


def _pdf(content: bytes, max_characters: int, max_pages: int) -> tuple[str, str]:
    """The pages' text, a blank line between them."""
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise Refused("is encrypted; save it without a password")
    if len(reader.pages) > max_pages:
        raise Refused(f"has {len(reader.pages)} pages, more than {max_pages}")
    parts, length = [], 0
    for page in reader.pages:
        parts.append(page.extract_text())
        length += len(parts[-1])
        if length > max_characters:
            raise Refused(too_long(max_characters))
    title = _or_empty(lambda: str(reader.metadata.title or "") if reader.metadata else "")
    return "\n\n".join(part.strip() for part in parts if part.strip()), title


def _or_empty(read: Callable[[], str]) -> str:
    try:
        return read()
    except Exception:  # a damaged title is no reason to refuse the text
        return ""


if __name__ == "__main__":
    main(sys.argv[1:])
