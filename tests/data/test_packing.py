import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.data.packing import pack


def pack_slowly(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing as its definition has it."""
    rows: list[list[int]] = []
    rooms: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[document]]
        if not fitting:
            rows.append([])
            rooms.append(capacity)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda row: rooms[row])
        rows[row].append(document)
        rooms[row] -= lengths[document]
    return rows


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_document_stands_once_in_a_row_that_holds_it(lengths: list[int]) -> None:
    rows = pack(lengths, capacity=64)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(sum(lengths[document] for document in row) <= 64 for row in rows)


@given(st.lists(st.integers(1, 64), max_size=200))
def test_rows_are_filled_as_the_definition_fills_them(lengths: list[int]) -> None:
    def fills(rows: list[list[int]]) -> list[int]:
        return sorted(sum(lengths[document] for document in row) for row in rows)

    assert fills(pack(lengths, capacity=64)) == fills(pack_slowly(lengths, 64))


@pytest.mark.parametrize("length", [0, 65])
def test_a_document_that_no_row_takes_is_our_mistake(length: int) -> None:
    with pytest.raises(ValueError, match="document 0"):
        pack([length], capacity=64)
