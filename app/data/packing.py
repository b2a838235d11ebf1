"""Packing: documents of uneven length into rows of equal capacity, best fit decreasing (Johnson 1973)."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Rows of document indices, the lengths of a row adding up to `capacity` at most. Same lengths, same rows.

    Each document, the longest first, goes into the row whose room it fills best. Rows are found by their room in the
    bits of one integer, which takes O(n · capacity / 64).
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where a row with room for r tokens is
    for document in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[document]
        if not 0 < length <= capacity:
            raise ValueError(f"document {document} has {length} tokens; a row takes 1 to {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
