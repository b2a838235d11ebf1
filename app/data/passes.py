"""The two passes of preparation, as Ray Data tasks over chunks: validate and hash; then tokenize, pack and write.

A task reads its own chunk and returns counts and hashes, never records. What it writes depends on the chunk and the
settings alone.
"""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from app.assets import model_folder
from app.config.data import PackedLayout, PrepareConfig, RecordFormat
from app.data.chunks import Chunk, read_chunk
from app.data.encoding import Tokens, Unusable, encode_records
from app.data.packing import pack
from app.data.prompts import template_from_json
from app.data.records import Invalid, Record, RowReader, split_of
from app.data.rejects import Reject, count, write_part
from app.data.shards import SPLITS, write_shard
from app.data.tokenization import Tokenizer, load_tokenizer
from app.errors import UserError
from app.ray_cluster import on_all_cpus

Advance = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""

DUPLICATE = "duplicate"
HASH_BYTES = 16


@dataclass(frozen=True)
class Settings:
    """What a task needs to know beside its chunk."""

    config: PrepareConfig
    template: dict[str, Any]
    special_tokens: tuple[str, ...]
    tokenizer_hash: str
    is_canonical: bool
    """Of the tokenizer: found out once, for all tasks."""
    staging: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a row before it was tokenized."""

    row: int
    raw: Any
    record: Record | None
    reasons: Sequence[str]
    """Why it was dropped; or, where there is a record, what was repaired."""

    def rejects(self) -> list[Reject]:
        if self.record is None:
            return [Reject(self.row, self.raw, "dropped", self.reasons[0])]
        return [Reject(self.row, self.raw, "repaired", reason) for reason in self.reasons]


def run_pass(
    items: list[dict[str, Any]],
    task: Callable[..., dict[str, Any]],
    settings: Settings,
    *,
    total: int,
    advance: Advance,
) -> list[dict[str, Any]]:
    """`task` on every item, a Ray task each; the results in the items' order.

    Raises:
        UserError: as a task raised it.
    """
    import ray.data

    chunks = on_all_cpus(ray.data.from_items(items, override_num_blocks=len(items)))
    results: list[dict[str, Any]] = []
    done = 0
    for row in chunks.map(_run, fn_kwargs={"task": task, "settings": settings}).iter_rows():
        if row.get("mistake"):
            raise UserError(row["mistake"])
        results.append(json.loads(row["report"]) | {"hashes": row.get("hashes")})
        done += results[-1]["rows"]
        advance(done, total)
    return sorted(results, key=lambda result: result["index"])


def _run(item: dict[str, Any], *, task: Callable[..., dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """`task`, whose mistakes come back as results: Ray wraps what is raised, and prints it with its stack."""
    try:
        with _uncollected():
            return task(item, settings=settings)
    except UserError as mistake:
        return {"mistake": str(mistake)}


def check_chunk(item: dict[str, Any], *, settings: Settings) -> dict[str, Any]:
    """Validate a chunk; its records' hashes, zeros where there is none."""
    outcomes = _read(_chunk(item), item["format"], settings)
    hashes = (o.record.content_hash()[: 2 * HASH_BYTES] if o.record else "00" * HASH_BYTES for o in outcomes)
    rejects = [reject for outcome in outcomes for reject in outcome.rejects()]
    report = {"index": item["index"], "rows": len(outcomes), "dropped": count(rejects, "dropped")}
    return {"report": json.dumps(report), "hashes": bytes.fromhex("".join(hashes))}


def write_chunk(item: dict[str, Any], *, settings: Settings) -> dict[str, Any]:
    """Validate, tokenize and pack a chunk, and write its shards and its rejects."""
    config, index, chunk = settings.config, int(item["index"]), _chunk(item)
    outcomes = _read(chunk, item["format"], settings)
    copies = set(item["duplicates"])
    hashes = [item["hashes"][start : start + HASH_BYTES].hex() for start in range(0, len(item["hashes"]), HASH_BYTES)]
    places = [place for place, outcome in enumerate(outcomes) if outcome.record and place not in copies]
    encoded = encode_records(
        [record for place in places if (record := outcomes[place].record)],
        template=template_from_json(settings.template),
        tokenizer=load_expected(config.model, settings.tokenizer_hash),
        max_length=config.max_length,
        truncation=config.truncation,
        is_canonical=settings.is_canonical,
    )
    documents: dict[str, list[Tokens]] = {split: [] for split in SPLITS}
    rejects = [Reject(outcomes[place].row, outcomes[place].raw, "dropped", DUPLICATE) for place in copies]
    rejects += [reject for place, outcome in enumerate(outcomes) if place not in copies for reject in outcome.rejects()]
    for place, of_record in zip(places, encoded, strict=True):
        row, raw = outcomes[place].row, outcomes[place].raw
        if isinstance(of_record, Unusable):
            rejects.append(Reject(row, raw, "dropped", of_record.reason))
            continue
        if of_record[0].is_cut:
            rejects.append(Reject(row, raw, "repaired", f"longer than max_length={config.max_length}, cut"))
        split = split_of(
            hashes[place],
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
        )
        documents[split] += of_record
    try:
        shards = [
            write_shard(settings.staging, split, index=index, rows=_rows(documents[split], split, index, config))
            for split in SPLITS
            if documents[split]
        ]
        write_part(settings.staging, index=index, source=chunk.source, rejects=rejects)
    except OSError as error:
        raise UserError(f"output={config.output!r} cannot be written: {error}") from None
    report = {
        "index": index,
        "rows": len(outcomes),
        "shards": shards,
        "dropped": count(rejects, "dropped"),
        "repaired": count(rejects, "repaired"),
    }
    return {"report": json.dumps(report)}


def _rows(documents: list[Tokens], split: str, index: int, config: PrepareConfig) -> list[list[Tokens]]:
    """Documents in the rows that they are stored in: of the training split packed if so set, and in a random order."""
    if split != "train":
        return [[document] for document in documents]
    rows = [[document] for document in documents]
    if isinstance(config.layout, PackedLayout):
        lengths = [len(document.input_ids) for document in documents]
        rows = [[documents[place] for place in row] for row in pack(lengths, capacity=config.layout.length)]
    order = np.random.default_rng((config.seed, index)).permutation(len(rows))
    return [rows[place] for place in order]


def _chunk(item: dict[str, Any]) -> Chunk:
    return Chunk(**json.loads(item["chunk"]))


def _read(chunk: Chunk, format: RecordFormat, settings: Settings) -> list[Outcome]:
    """The chunk's rows, validated.

    Raises:
        UserError: with on_invalid='fail', at the first that is not valid as it stands.
    """
    config = settings.config
    reader = RowReader(format, config.fields, settings.special_tokens)
    outcomes = []
    for row, raw in enumerate(read_chunk(chunk), start=chunk.first_row):
        record: Record | None
        reasons: Sequence[str]
        try:
            record, reasons = reader.read(raw)
        except Invalid as problem:
            record, reasons = None, [str(problem)]
        if reasons and config.on_invalid == "fail":
            raise UserError(f"source={chunk.source!r}: row {row}: {reasons[0]}; on_invalid='fail' stops here")
        if reasons and config.on_invalid == "drop":
            record = None
        outcomes.append(Outcome(row, raw, record, reasons))
    return outcomes


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection in the block: it makes lists by the thousand, which hold nothing that could be a cycle."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@lru_cache(maxsize=1)
def load_expected(model: str, tokenizer_hash: str) -> Tokenizer:
    """The tokenizer of `model`, loaded once per worker process, which works on many chunks.

    Raises:
        UserError: it is not the one that the driver has.
    """
    tokenizer = load_tokenizer(model_folder(model))
    if tokenizer.fingerprint() != tokenizer_hash:
        raise UserError(f"model={model!r}: its tokenizer is another one on a worker's node than where the job started")
    return tokenizer
