"""Prepared data on disk: Parquet shards of token ids, and the manifest that names them.

    FOLDER/manifest.json
    FOLDER/train/00000.parquet …        a row: input_ids, loss_mask, and the lengths of the documents in it
    FOLDER/validation/00000.parquet …   one document a row
    FOLDER/test/…
    FOLDER/rejected.parquet             every source row that was dropped or repaired, and why

A folder appears as a whole or not at all.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.data.encoding import Tokens
from app.errors import UserError

SPLITS = ("train", "validation", "test")
MANIFEST, REJECTED, REPORT = "manifest.json", "rejected.parquet", "report.html"
CONTENTS = (MANIFEST, REJECTED, REPORT, *SPLITS)
FORMAT = 2

ROW_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("lengths", pa.list_(pa.int32())),
    ]
)
COLUMNS = tuple(ROW_SCHEMA.names)


@dataclass(frozen=True)
class Manifest:
    values: dict[str, Any]
    folder: Path

    def content_hash(self) -> str:
        """Of all shards: equal for equal records in equal order."""
        return hashlib.sha256("".join(shard["sha256"] for shard in self.values["shards"]).encode()).hexdigest()

    @property
    def max_length(self) -> int:
        """Of a document, in tokens."""
        return self.values["config"]["max_length"]

    @property
    def fixed_length(self) -> int | None:
        """What rows are padded to, where their layout fixes it."""
        layout = self.values["config"]["layout"]
        return layout["length"] if layout["type"] == "fixed" else None

    def num_rows(self, split: str) -> int:
        return self.values["splits"][split]["rows"]

    def num_records(self, split: str) -> int:
        """Documents, of which a packed row holds several."""
        return self.values["splits"][split]["records"]

    def shards(self, split: str) -> list[tuple[str, int]]:
        """The files of a split, in order, and how many rows each has."""
        named = [shard for shard in self.values["shards"] if shard["split"] == split]
        return [(str(self.folder / shard["file"]), shard["rows"]) for shard in named]

    def files(self, split: str) -> list[str]:
        return [file for file, _ in self.shards(split)]

    def read(self, split: str) -> pa.Table:
        """All rows of a split, in order, in memory."""
        return pa.concat_tables([ROW_SCHEMA.empty_table(), *map(pq.read_table, self.files(split))])


def read_manifest(folder: str) -> Manifest:
    """The manifest of prepared data in `folder`.

    Raises:
        UserError: the folder was not written by `pacos prepare`, or a shard is missing.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = Manifest(json.loads(path.read_text(encoding="utf-8")), Path(folder).resolve())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"data={folder!r} holds no {MANIFEST}; write it with `pacos prepare`") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run `pacos prepare` again") from None
    if not isinstance(manifest.values, dict) or not {"shards", "splits", "config"} <= manifest.values.keys():
        raise UserError(f"{path} is not of prepared data; write it with `pacos prepare`")
    if manifest.values.get("format") != FORMAT:
        raise UserError(f"data={folder!r} was prepared by another version of pacos; run `pacos prepare` again")
    missing = [file for split in SPLITS for file in manifest.files(split) if not Path(file).is_file()]
    if missing:
        raise UserError(f"data={folder!r} lacks {missing[0]}, which its manifest names; run `pacos prepare` again")
    return manifest


def write_shard(folder: Path, split: str, *, index: int, rows: Sequence[Sequence[Tokens]]) -> dict[str, Any]:
    """Write rows, each of one or several documents, to `SPLIT/INDEX.parquet`; returns the shard's entry."""
    documents = [document for row in rows for document in row]
    lengths = np.array([len(document.input_ids) for document in documents], dtype=np.int32)
    tokens = chain.from_iterable([document.input_ids for document in documents])
    ids = np.fromiter(tokens, dtype=np.int32, count=int(lengths.sum()))
    runs = np.array([run for document in documents for run in document.runs], dtype=np.int32).reshape(-1, 2)
    mask = np.repeat(runs[:, 1].astype(bool), runs[:, 0])
    documents_before = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    tokens_before = np.concatenate([[0], np.cumsum(lengths)])[documents_before]
    columns = [_lists(tokens_before, ids), _lists(tokens_before, mask), _lists(documents_before, lengths)]
    file = f"{split}/{index:05d}.parquet"
    pq.write_table(pa.Table.from_arrays(columns, schema=ROW_SCHEMA), folder / file, compression="zstd")
    return {
        "split": split,
        "file": file,
        "rows": len(rows),
        "records": len(documents),
        "tokens": len(ids),
        "loss_tokens": int(mask.sum()),
        "cut": sum(document.is_cut for document in documents),
        "sha256": hashlib.sha256((folder / file).read_bytes()).hexdigest(),
    }


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
