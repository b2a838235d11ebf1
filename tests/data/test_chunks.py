import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.data import chunks
from app.data.chunks import Unreadable, cut, read_chunk, read_rows
from app.errors import UserError

ROW = {"instruction": "Say hello.", "input": "", "output": "Hello."}

json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chunks")


@given(rows=st.lists(json_values, min_size=1, max_size=12), per_chunk=st.integers(1, 5), data=st.data())
def test_chunks_of_an_array_hold_its_elements_wherever_windows_end(folder: Path, rows, per_chunk: int, data) -> None:
    file = write(
        folder / "a.json",
        json.dumps(rows, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 1]))),
    )
    window = chunks._WINDOW_BYTES
    chunks._WINDOW_BYTES = data.draw(st.integers(1, 40))
    try:
        cuts = cut(file, source="a", rows_per_chunk=per_chunk)
    finally:
        chunks._WINDOW_BYTES = window
    assert [value for chunk in cuts for value in read_chunk(chunk)] == rows
    assert [chunk.first_row for chunk in cuts] == list(range(0, len(rows), per_chunk))


@given(rows=st.lists(json_values, min_size=1, max_size=12), per_chunk=st.integers(1, 5))
def test_chunks_of_lines_hold_their_values(folder: Path, rows, per_chunk: int) -> None:
    lines = [{"value": value} for value in rows]
    file = write(folder / "l.jsonl", "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert [v for chunk in cut(file, source="l", rows_per_chunk=per_chunk) for v in read_chunk(chunk)] == lines


def test_json_array_and_json_lines_read_alike(tmp_path: Path) -> None:
    array = write(tmp_path / "a.json", json.dumps([ROW, ROW], indent=1))
    lines = write(tmp_path / "a.jsonl", f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n")
    assert list(read_rows(array)) == list(read_rows(lines)) == [ROW, ROW]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    for text in (json.dumps(ROW), json.dumps([ROW])):
        assert list(read_rows(write(tmp_path / "bom.json", b"\xef\xbb\xbf" + text.encode()))) == [ROW]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    row = {**ROW, "output": "one\u2028two"}
    assert list(read_rows(write(tmp_path / "u.jsonl", json.dumps(row, ensure_ascii=False)))) == [row]


def test_a_line_that_is_not_json_is_a_row_of_its_own_and_loses_no_other(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", f"{json.dumps(ROW)}\nnot json\n{json.dumps(ROW)}\n")
    assert list(read_rows(file)) == [ROW, Unreadable("not json"), ROW]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("[]", "empty array"),
        (json.dumps(ROW, indent=2), "one JSON object where an array"),
        ('[{"instruction": ', "line 1 is not valid JSON"),
        ('[{"a": 1},\n{"a": }]', "line 2 is not valid JSON"),
        ("[1, 2", "line 1 is not valid JSON"),
        ("[1 2]", "Expecting ',' or ']'"),
        ("[1]\n[2]", "line 2 is not valid JSON: Extra data"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"output": "caf\xe9"}]'.encode("latin-1"), "byte 16 is not UTF-8"),
        ('{"output": "caf\xe9"}'.encode("latin-1"), "byte 15 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, content: bytes | str, part: str) -> None:
    file = write(tmp_path / "bad.json", content)
    with pytest.raises(UserError, match=part) as caught:
        list(read_rows(file))
    assert str(file) in str(caught.value)


def test_a_mistake_is_told_without_reading_the_rest_into_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "_WINDOW_BYTES", 100)
    rows = [json.dumps({"n": random.random()}) for _ in range(1000)]
    rows[3] = '{"n": oops}'
    file = write(tmp_path / "a.json", "[" + ",\n".join(rows) + "]")
    with pytest.raises(UserError, match="line 4 is not valid JSON: Expecting value"):
        cut(file, source="a", rows_per_chunk=10)
