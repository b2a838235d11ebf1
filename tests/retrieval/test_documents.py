import os
from pathlib import Path

import pytest
from hand_made_pdf import make_pdf

from app.errors import UserError
from app.retrieval.documents import read_documents


def test_a_folder_is_read_recursively_in_order_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    for name in ("b.md", "sub/a.TXT", "a.txt", ".git/c.md", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    documents, skipped = read_documents(str(tmp_path))
    assert [document.name for document in documents] == ["a.txt", "b.md", "sub/a.TXT"]
    assert skipped == []


def test_empty_and_undecodable_files_are_left_out_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text("good")
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    documents, skipped = read_documents(str(tmp_path))
    assert [document.name for document in documents] == ["good.md"]
    assert [(file.name, file.reason.split(";")[0]) for file in skipped] == [
        ("empty.md", "holds no text"),
        ("latin.txt", "byte 2 is not UTF-8"),
    ]


def test_a_file_whose_name_is_not_utf8_is_left_out_under_one_that_can_be_shown(tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text("good")
    folder = tmp_path / os.fsdecode(b"Gr\xf6\xdfe")
    folder.mkdir()
    (folder / "hay.md").write_text("hay")
    documents, skipped = read_documents(str(tmp_path))
    assert [document.name for document in documents] == ["good.md"]
    assert [(file.name, file.reason.split(";")[0]) for file in skipped] == [
        (r"Gr\xf6\xdfe/hay.md", "its name is not UTF-8")
    ]


def test_html_and_pdf_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<title>Page</title><h1>Hay</h1><p>It is dry.</p>")
    (tmp_path / "paper.pdf").write_bytes(make_pdf(["It is wet."], title="Paper"))
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7")
    documents, skipped = read_documents(str(tmp_path))
    assert [(document.name, document.title) for document in documents] == [
        ("page.html", "Page"),
        ("paper.pdf", "Paper"),
    ]
    assert [(file.name, file.reason.split(" (")[0]) for file in skipped] == [("broken.pdf", "is damaged")]


def test_one_file_is_a_document_by_its_own_name_with_plain_line_ends(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbffirst\r\n\r\nsecond")
    (document,), _ = read_documents(str(tmp_path / "one.txt"))
    assert (document.name, document.text) == ("one.txt", "first\n\nsecond")


def test_nothing_to_read_is_an_error_that_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder or file"):
        read_documents(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"holds none of \.txt, "):
        read_documents(str(tmp_path))
    (tmp_path / "latin.md").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"no file can be used; latin\.md: byte 0 is not UTF-8"):
        read_documents(str(tmp_path))
