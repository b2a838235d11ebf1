"""Links and names in the documents lead to something: files, headings, functions, tests."""

import functools
import re
import subprocess
from pathlib import Path

import pytest

from tests.documentation.reading import DOCUMENTS, REPOSITORY, text_of

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SOURCE = re.compile(r"^([\w./-]+\.(?:py|c|h|html|yaml|sh))(?::(\w+))?$")
"""A file of ours, perhaps with the name of something in it. Results such as `delta.json` are not in the repository."""
NOT_OURS = {"keys.yaml", "report.html", "utils.py"}
"""What users or runs write, and what there is not to be."""


@functools.cache
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode == 0:
        return listed.stdout.splitlines()
    return [str(file.relative_to(REPOSITORY)) for file in REPOSITORY.rglob("*") if file.is_file()]


@functools.cache
def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"(?m)^#+ (.+?)\s*$", text_of(document))
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(document: Path, text: str) -> list[str]:
    found = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists():
            found.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            found.append(f"{target}: no such heading; there are {sorted(anchors(file))}")
    return found


def wrong_names(text: str) -> list[str]:
    """In code spans: `app/x.py`, `x.py`, `app/x.py:function`, `folder/`, `test_something`."""
    found = []
    for span in CODE.findall(text):
        source = SOURCE.match(span)
        if source and span not in NOT_OURS:
            path = source[1].removeprefix("../")
            files = [name for name in tracked() if f"/{name}".endswith(f"/{path}")]
            if not files:
                found.append(f"{span}: no such file")
            elif source[2] and not any(_defines(name, source[2]) for name in files):
                found.append(f"{span}: {source[1]} has no {source[2]}")
        elif re.fullmatch(r"(app|tune|jobs|cluster|benchmarks|docs|tests|configs|examples)/[\w./-]*", span):
            if not (REPOSITORY / span).exists() and not any(name.startswith(span) for name in tracked()):
                found.append(f"{span}: no such folder")
        elif re.fullmatch(r"test_\w+_\w+", span) and not _is_test(span):
            found.append(f"{span}: no such test")
    return found


@functools.cache
def _read(name: str) -> str:
    return (REPOSITORY / name).read_text()


def _defines(name: str, what: str) -> bool:
    return re.search(rf"(?m)^\s*(async )?(def|class) {what}\b|^{what}\b.*=", _read(name)) is not None


@functools.cache
def _is_test(name: str) -> bool:
    return any(
        f"def {name}(" in _read(file) for file in tracked() if file.startswith("tests/") and file.endswith(".py")
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(REPOSITORY)))
def test_every_link_and_every_name_leads_to_something(document: Path) -> None:
    text = text_of(document)
    faults = broken_links(document, text) + wrong_names(text)
    assert not faults, "\n".join(faults)


def test_what_leads_nowhere_is_noticed() -> None:
    readme = REPOSITORY / "README.md"
    text = "[a](docs/absent.md) [b](docs/engine.md#absent) [c](#absent) [d](docs/engine.md#memory) [e](https://ray.io)"
    assert [fault.split(":")[0] for fault in broken_links(readme, text)] == [
        "docs/absent.md", "docs/engine.md#absent", "#absent",
    ]  # fmt: skip
    names = "`app/no.py` `no.py` `app/data/prepare.py:no` `app/no/` `test_no_test` `configs/no.yaml`"
    assert len(wrong_names(names)) == 6
    right = "`app/data/prepare.py:plan_preparation` `loop.py` `kernels/products.c` `app/engine/` `delta.json`"
    assert wrong_names(right) == []


def test_the_readme_leads_to_every_document() -> None:
    linked = set(LINK.findall(text_of(REPOSITORY / "README.md")))
    documents = {f"docs/{file.name}" for file in (REPOSITORY / "docs").glob("*.md")}
    assert documents <= linked, f"not in README.md's table: {sorted(documents - linked)}"


def test_every_picture_is_shown_somewhere() -> None:
    shown = {
        (document.parent / target).resolve() for document in DOCUMENTS for target in LINK.findall(text_of(document))
    }
    pictures = {
        REPOSITORY / name for name in tracked() if name.endswith((".png", ".svg")) and not name.startswith("tests/")
    }
    assert pictures <= shown, sorted(str(picture) for picture in pictures - shown)
