"""What mkdocs calls while it builds the site, so that the same files can be read on GitHub and there.

On GitHub README.md is the first page, and its table leads to the others. So it is here: it becomes the index, and the
contents follow from its table. What the pages link outside of docs/ is taken in under its own path.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parent.parent
INDEX, DOCS = "README.md", "docs"
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_config(config: Any) -> Any:
    """The contents: every page that README.md's table leads to, in its order."""
    table = [line for line in (REPOSITORY / INDEX).read_text().splitlines() if line.startswith("| ")]
    pages = [target for line in table for _, target, _, _ in _LINK.findall(line) if target.endswith(".md")]
    config.nav = [{"Pacos": "index.md"}, *(place_of(page) for page in dict.fromkeys(pages))]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds what is linked and lies elsewhere, and what that links."""
    waiting = [INDEX, *(f"{DOCS}/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith(f"{DOCS}/"):
            files.append(File.generated(config, place_of(path), abs_src_path=str(REPOSITORY / path)))
        if path.endswith(".md"):
            linked = {target for _, target in _local_links(path, (REPOSITORY / path).read_text())} - seen
            waiting += sorted(linked)
            seen |= linked
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The links, as they lead from page to page of the site."""
    here = _path_of(page.file.src_uri)
    places = {written: place_of(path) for written, path in _local_links(here, markdown)}
    folder = os.path.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        if link[2] not in places:
            return link[0]
        return f"{link[1]}{os.path.relpath(places[link[2]], folder or '.')}{link[3] or ''}{link[4]}"

    return _LINK.sub(moved, markdown)


def place_of(path: str) -> str:
    """Of a file of the repository in the site: docs/ at its root, the rest below it, README.md as the index."""
    return "index.md" if path == INDEX else path.removeprefix(f"{DOCS}/")


def _path_of(place: str) -> str:
    if place == "index.md":
        return INDEX
    return place if (REPOSITORY / place).exists() else f"{DOCS}/{place}"


def _local_links(path: str, markdown: str) -> list[tuple[str, str]]:
    """Links to files of the repository: as they are written in `path`, and from the repository's root."""
    found = []
    for _, written, _, _ in _LINK.findall(markdown):
        target = os.path.normpath(os.path.join(os.path.dirname(path), written))
        if not re.match(r"[a-z]+:", written) and (REPOSITORY / target).is_file():
            found.append((written, target))
    return found
