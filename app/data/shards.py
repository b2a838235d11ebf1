"""Prepared data on disk: Parquet shards of token ids, written by Ray Data, and the manifest that names them.

    FOLDER/manifest.json
    FOLDER/train/00000.parquet …        input_ids: list<int32>, loss_mask: list<bool>
    FOLDER/validation/00000.parquet …
    FOLDER/rejected.jsonl               row number and reason of every record that was left out

A folder appears as a whole or not at all.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.assets import model_folder
from app.atomic import replaced_folder
from app.config.schema import PrepareConfig
from app.data.prompts import TEMPLATE_NAME, render_prompt, render_response
from app.data.records import Record, is_held_out_hash, read_rows, validate_row
from app.data.tokenization import Tokenizer, Tokens, join, load_tokenizer
from app.errors import UserError

SPLITS = ("train", "validation")
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_()))])
_MANIFEST, _REJECTED = "manifest.json", "rejected.jsonl"

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""


@dataclass(frozen=True)
class Manifest:
    values: dict[str, Any]
    folder: Path

    def content_hash(self) -> str:
        """Of all shards: equal for equal records in equal order."""
        return hashlib.sha256("".join(shard["sha256"] for shard in self.values["shards"]).encode()).hexdigest()

    def num_records(self, split: str) -> int:
        return self.values["splits"][split]["records"]

    def files(self, split: str) -> list[str]:
        return [str(self.folder / shard["file"]) for shard in self.values["shards"] if shard["split"] == split]

    def read(self, split: str) -> pa.Table:
        """All records of a split, in order, in memory."""
        return pa.concat_tables([_SCHEMA.empty_table(), *map(pq.read_table, self.files(split))])


def prepare(config: PrepareConfig, *, progress: Progress = lambda done, total: None) -> Manifest:
    """Read, validate, tokenize and write `config.source`, one Ray task per shard. Ray is initialised.

    Raises:
        UserError: the source cannot be read, or none of its records is valid.
    """
    import ray

    tokenizer = load_tokenizer(model_folder(config.model))  # here first, so that a bad folder is told at once
    rows = list(read_rows(config.source))
    with replaced_folder(Path(config.output), contents=(_MANIFEST, _REJECTED, *SPLITS)) as staging:
        for split in SPLITS:
            (staging / split).mkdir()
        starts = range(0, len(rows), config.records_per_shard)
        blocks = [_raw_block(rows[start : start + config.records_per_shard], start) for start in starts]
        shards = ray.data.from_arrow(blocks).map_batches(
            _write_shard,
            batch_size=None,  # a whole block: block boundaries alone decide what is in a shard
            batch_format="pyarrow",
            fn_kwargs={"staging": staging, "config": config},
        )
        reports, done = [], 0
        for row in shards.iter_rows():
            reports.append(json.loads(row["report"]))
            done += reports[-1]["rows"]
            progress(done, len(rows))
        reports.sort(key=lambda report: report["shards"][0]["file"])
        rejected = [item for report in reports for item in report["rejected"]]
        if len(rejected) == len(rows):
            raise UserError(f"source={config.source!r}: no valid record among {len(rows)}; {_reasons(rejected)}")
        (staging / _REJECTED).write_text("".join(json.dumps(item) + "\n" for item in rejected))
        values = _manifest(config, tokenizer, num_rows=len(rows), reports=reports, rejected=rejected)
        (staging / _MANIFEST).write_text(json.dumps(values, indent=2) + "\n")
    return read_manifest(config.output)


def read_manifest(folder: str) -> Manifest:
    """The manifest of prepared data in `folder`.

    Raises:
        UserError: the folder was not written by `pacos prepare`, or a shard is missing.
    """
    path = Path(folder) / _MANIFEST
    try:
        manifest = Manifest(json.loads(path.read_text(encoding="utf-8")), Path(folder).resolve())
    except FileNotFoundError:
        raise UserError(f"data={folder!r} holds no {_MANIFEST}; write it with `pacos prepare`") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run `pacos prepare` again") from None
    if not isinstance(manifest.values, dict) or not {"shards", "splits", "config"} <= manifest.values.keys():
        raise UserError(f"{path} is not of prepared data; write it with `pacos prepare`")
    missing = [file for split in SPLITS for file in manifest.files(split) if not Path(file).is_file()]
    if missing:
        raise UserError(f"data={folder!r} lacks {missing[0]}, which its manifest names; run `pacos prepare` again")
    return manifest


def tokenize_record(record: Record, tokenizer: Tokenizer, *, max_length: int) -> Tokens | None:
    """Ids and loss mask of one record; None where the prompt leaves no room for a response."""
    prompt = tokenizer.encode(render_prompt(record.instruction, record.input))
    response = tokenizer.encode(render_response(record.output))
    return join(prompt, response, end_id=tokenizer.end_id, max_length=max_length)


def _raw_block(rows: list[Any], start: int) -> pa.Table:
    """Rows as JSON text: their fields and types are only known once each is validated."""
    return pa.table({"row": range(start, start + len(rows)), "json": [json.dumps(row) for row in rows]})


def _write_shard(block: pa.Table, *, staging: Path, config: PrepareConfig) -> pa.Table:
    """One Ray task: validate and tokenize a block, write its Parquet files, return a one-row report."""
    tokenizer = load_tokenizer(model_folder(config.model))
    numbers, rows = block["row"].to_pylist(), [json.loads(text) for text in block["json"].to_pylist()]
    kept: dict[str, list[Tokens]] = {split: [] for split in SPLITS}
    rejected = []
    for number, row in zip(numbers, rows, strict=True):
        record = validate_row(row)
        if isinstance(record, str):
            rejected.append({"row": number, "reason": record})
            continue
        tokens = tokenize_record(record, tokenizer, max_length=config.max_length)
        if tokens is None:
            rejected.append({"row": number, "reason": f"prompt: fills max_length={config.max_length}"})
            continue
        held_out = is_held_out_hash(record.content_hash(), fraction=config.validation_fraction)
        kept["validation" if held_out else "train"].append(tokens)
    shards = [
        _write_split(staging, split, index=numbers[0] // config.records_per_shard, tokens=kept[split])
        for split in SPLITS
    ]
    return pa.table({"report": [json.dumps({"rows": len(rows), "shards": shards, "rejected": rejected})]})


def _write_split(staging: Path, split: str, *, index: int, tokens: list[Tokens]) -> dict[str, Any]:
    file = f"{split}/{index:05d}.parquet"
    columns = {"input_ids": [item.input_ids for item in tokens], "loss_mask": [item.loss_mask for item in tokens]}
    pq.write_table(pa.table(columns, schema=_SCHEMA), staging / file, compression="zstd")
    return {
        "split": split,
        "file": file,
        "records": len(tokens),
        "tokens": sum(len(item.input_ids) for item in tokens),
        "loss_tokens": sum(sum(item.loss_mask) for item in tokens),
        "truncated": sum(item.truncated for item in tokens),
        "sha256": hashlib.sha256((staging / file).read_bytes()).hexdigest(),
    }


def _manifest(
    config: PrepareConfig, tokenizer: Tokenizer, *, num_rows: int, reports: list[Any], rejected: list[Any]
) -> dict[str, Any]:
    shards = [shard for report in reports for shard in report["shards"]]
    counted = ("records", "tokens", "loss_tokens", "truncated")
    return {
        "format": 1,
        "config": config.model_dump(mode="json"),
        "source_sha256": hashlib.sha256(Path(config.source).read_bytes()).hexdigest(),
        "tokenizer_hash": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "template": TEMPLATE_NAME,
        "rows": num_rows,
        "rejected": dict(Counter(item["reason"] for item in rejected).most_common()),
        "splits": {
            split: {key: sum(shard[key] for shard in shards if shard["split"] == split) for key in counted}
            for split in SPLITS
        },
        "shards": shards,
    }


def _reasons(rejected: Iterable[dict[str, Any]]) -> str:
    counts = Counter(item["reason"] for item in rejected)
    return "reasons: " + ", ".join(f"{reason} ({count})" for reason, count in counts.most_common(5))
