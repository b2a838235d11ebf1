import json
from pathlib import Path

import pytest

from app.data.records import Record, is_held_out_hash, read_rows, validate_row
from app.errors import UserError


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


ROW = {"instruction": "Say hello.", "input": "", "output": "Hello."}


def test_json_array_and_json_lines_read_alike(tmp_path: Path) -> None:
    array = write(tmp_path / "a.json", json.dumps([ROW, ROW], indent=1))
    lines = write(tmp_path / "a.jsonl", f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n")
    assert list(read_rows(array)) == list(read_rows(lines)) == [ROW, ROW]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    assert list(read_rows(write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + json.dumps(ROW).encode()))) == [ROW]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    row = {**ROW, "output": "one\u2028two"}
    assert list(read_rows(write(tmp_path / "u.jsonl", json.dumps(row, ensure_ascii=False)))) == [row]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("[]", "empty array"),
        (json.dumps(ROW, indent=2), "one JSON object where an array"),
        ('[{"instruction": ', "not valid JSON"),
        (json.dumps(ROW) + "\nnot json\n", "line 2 is not valid JSON"),
        ('[{"output": "caf\xe9"}]'.encode("latin-1"), "byte 16 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, content: bytes | str, part: str) -> None:
    source = write(tmp_path / "bad.json", content)
    with pytest.raises(UserError, match=part) as caught:
        list(read_rows(source))
    assert source in str(caught.value)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_rows(str(tmp_path / "nothing.json"))
    with pytest.raises(UserError, match="is a folder"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"output": "x"}, "instruction: missing"),
        ({"instruction": "x"}, "output: missing"),
        ({"instruction": "x", "output": " "}, "output: empty"),
        ({"instruction": "", "output": "x"}, "instruction: empty"),
        ({"instruction": "x", "output": 0}, "output: not text"),
        ({"instruction": "x", "input": ["a"], "output": "y"}, "input: not text"),
        ({"instruction": "x", "output": "\ud800"}, "output: a lone surrogate, which is not valid Unicode"),
        ("text", "not an object"),
    ],
)
def test_an_invalid_record_is_refused_with_its_reason(row: object, reason: str) -> None:
    assert validate_row(row) == reason


def test_text_is_stripped_and_a_missing_input_is_empty() -> None:
    assert validate_row({"instruction": " a ", "input": None, "output": "b\n"}) == Record("a", "", "b")


@pytest.mark.parametrize("marker", ["<noinput>", "No input", "noinput.", "No Input Required.", "<no input>"])
def test_markers_of_no_input_are_repaired(marker: str) -> None:
    assert validate_row({"instruction": "a", "input": marker, "output": "b"}) == Record("a", "", "b")


def test_an_input_that_only_speaks_of_no_input_is_kept() -> None:
    text = "No input device was found."
    assert validate_row({"instruction": "a", "input": text, "output": "b"}) == Record("a", text, "b")


def test_the_split_depends_on_content_alone_and_has_the_wanted_share() -> None:
    records = [Record(f"question {number}", "", "answer") for number in range(5000)]
    held_out = [is_held_out_hash(record.content_hash(), fraction=0.1) for record in records]
    assert held_out == [is_held_out_hash(Record(*vars(r).values()).content_hash(), fraction=0.1) for r in records]
    assert 0.08 < sum(held_out) / len(held_out) < 0.12
