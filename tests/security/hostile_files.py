"""Files as someone would make them who wants more of their reader than data."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any


class Attack:
    """Unpickling one makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def a_pickle(mark: Path) -> bytes:
    return pickle.dumps({"weight": Attack(mark)})


def with_header(header: bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with `header`, which it says is `length` bytes long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "a header longer than the file": with_header(b"{}", length=2**62),
    "a header of a gigabyte": with_header(b"{}" + b" " * 1000, length=2**30),
    "a shape of four terabytes": with_header({"a": tensor([2**40], [0, 4])}, b"1234"),
    "a shape whose product overflows": with_header({"a": tensor([2**33, 2**33], [0, 0])}),
    "data behind the end": with_header({"a": tensor([1024], [0, 4096])}, b"1234"),
    "data before the beginning": with_header({"a": tensor([1], [-4, 0])}, b"1234"),
    "an end before its beginning": with_header({"a": tensor([1], [4, 0])}, b"1234"),
    "two tensors in one place": with_header({"a": tensor([1], [0, 4]), "b": tensor([1], [0, 4])}, b"1234"),
    "bytes that belong to none": with_header({"a": tensor([1], [0, 4])}, b"12345678"),
    "a type that there is not": with_header({"a": tensor([1], [0, 4], "PICKLE")}, b"1234"),
    "a header nested without end": with_header(b'{"a":' * 100_000),
    "a header that is no JSON": with_header(b"\x80\x04."),
    "nothing at all": b"",
}

NESTED = b"[" * 200_000
"""JSON that is deeper than its reader may go."""


def make_enormous(file: Path) -> None:
    """Sixteen gigabytes, which take no room on the disk."""
    with file.open("wb") as stream:
        stream.truncate(2**34)
