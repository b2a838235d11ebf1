"""The rows that were dropped or repaired, each with its reason: `rejected.parquet`, and how many there are of each."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from app.data.chunks import Unreadable
from app.data.shards import REJECTED

PARTS = "rejects"
"""Folder of the parts that tasks write, before they become one file."""
_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),
        ("action", pa.string()),
        ("reason", pa.string()),
        ("record", pa.string()),
    ]
)
Action = Literal["dropped", "repaired"]
Counts = dict[str, list[int]]
"""By reason: how many rows, and the first of them."""


class Reject(NamedTuple):
    row: int
    raw: Any
    """The row as it was read."""
    action: Action
    reason: str


def count(rejects: Sequence[Reject], action: Action) -> Counts:
    counts: Counts = {}
    for reject in rejects:
        if reject.action == action:
            counts.setdefault(reject.reason, [0, reject.row])[0] += 1
    return counts


def write_part(staging: Path, *, index: int, source: str, rejects: Sequence[Reject]) -> None:
    """Those of one chunk."""
    if not rejects:
        return
    rows = [
        {"source": source, "row": row, "action": action, "reason": reason, "record": _as_text(raw)}
        for row, raw, action, reason in sorted(rejects, key=lambda reject: reject.row)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), staging / PARTS / f"{index:05d}.parquet")


def merge_parts(staging: Path) -> None:
    """One file of all, a chunk at a time."""
    with pq.ParquetWriter(staging / REJECTED, _SCHEMA, compression="zstd") as writer:
        for part in sorted((staging / PARTS).iterdir()):
            writer.write_table(pq.read_table(part))
    shutil.rmtree(staging / PARTS)


def _as_text(raw: Any) -> str:
    text = raw.text if isinstance(raw, Unreadable) else json.dumps(raw, ensure_ascii=False)
    return text.encode(errors="replace").decode()
