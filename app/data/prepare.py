"""`pacos prepare`: sources -> valid records -> ids and loss masks -> rows -> Parquet shards and their manifest.

Two passes of Ray Data over chunks of the sources, each chunk read by the task that works on it. The first validates,
so that a mistake is told before the long work, and hashes, so that copies are known wherever they lie; the second
tokenizes, packs and writes. What a chunk becomes depends on the chunk and the configuration alone, never on how many
workers there are or which is first; and memory holds a few chunks, however long the source is.
"""

import gc
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app import __version__
from app.assets import model_folder
from app.atomic import check_replaceable, replaced_folder
from app.config.schema import PackedLayout, PrepareConfig, RecordFormat
from app.data.chunks import Chunk, Unreadable, cut, read_chunk
from app.data.encoding import Tokens, TooLong, encode_records
from app.data.packing import pack
from app.data.prompts import resolve_template, template_from_json
from app.data.records import FIELDS, Invalid, Record, RowReader, detect_format, split_of
from app.data.shards import CONTENTS, FORMAT, MANIFEST, REJECTED, SPLITS, Manifest, read_manifest, write_shard
from app.data.sources import SourceFile, as_json, fetch, file_hash, find_files, identity
from app.data.tokenization import Tokenizer, load_tokenizer
from app.errors import UserError
from app.ray_cluster import on_all_cpus

Advance = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""
Progress = Callable[[str], AbstractContextManager[Advance]]
"""Called with the name of a pass; what it returns is entered for the pass."""

DUPLICATE = "duplicate"
_SPOOL, _REJECTS = "spool", "rejects"
_HASH_BYTES = 16
_REJECT_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),
        ("action", pa.string()),
        ("reason", pa.string()),
        ("record", pa.string()),
    ]
)


@dataclass(frozen=True)
class Plan:
    """A checked configuration, with the files that it means as they are now."""

    config: PrepareConfig
    files: list[SourceFile]
    identities: list[str]
    tokenizer: Tokenizer
    template: dict[str, Any]
    fingerprint: str
    """Of everything that decides what is written: equal fingerprints, equal shards."""

    def finished(self) -> Manifest | None:
        """What an earlier run of the same made, if it is there and whole."""
        if not (Path(self.config.output) / MANIFEST).exists():
            return None
        try:
            manifest = read_manifest(self.config.output)
        except UserError:
            return None
        return manifest if manifest.values.get("fingerprint") == self.fingerprint else None


@dataclass(frozen=True)
class Source:
    """A file, read once: what it holds and where to cut it."""

    name: str
    sha256: str
    format: RecordFormat
    chunks: list[Chunk]

    @property
    def num_rows(self) -> int:
        return sum(chunk.num_rows for chunk in self.chunks)


@dataclass(frozen=True)
class Work:
    """Everything that the two passes need, and the folder that they write."""

    plan: Plan
    sources: list[Source]
    staging: Path

    @property
    def num_rows(self) -> int:
        return sum(source.num_rows for source in self.sources)

    def items(self) -> list[dict[str, Any]]:
        """A row for each chunk, for Ray Data."""
        pairs = [(source, chunk) for source in self.sources for chunk in source.chunks]
        return [
            {"index": index, "chunk": json.dumps(asdict(chunk)), "format": source.format}
            for index, (source, chunk) in enumerate(pairs)
        ]


@dataclass(frozen=True)
class Settings:
    """What a task needs to know beside its chunk."""

    config: PrepareConfig
    template: dict[str, Any]
    special_tokens: tuple[str, ...]
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


def prepare(config: PrepareConfig, *, progress: Progress = lambda name: nullcontext(_no_advance)) -> Manifest:
    """Prepare `config.source`, unless that is done already; Ray is initialised.

    Raises:
        UserError: a source cannot be read, no record is valid, or too many are not.
    """
    plan = plan_preparation(config)
    if manifest := plan.finished():
        return manifest
    with opened(plan) as work:
        run(work, progress=progress)
    return read_manifest(config.output)


def plan_preparation(config: PrepareConfig) -> Plan:
    """Find the files, the tokenizer and the template; nothing is written.

    Raises:
        UserError: one of them is not there or damaged, or the output folder holds something else.
    """
    check_replaceable(Path(config.output), CONTENTS)
    folder = model_folder(config.model)
    tokenizer = load_tokenizer(folder)
    template = resolve_template(config.template, tokenizer_folder=folder).to_json()
    files = find_files(config.sources)
    identities = [identity(file) for file in files]
    decisive = {
        "format": FORMAT,
        "version": __version__,
        "config": config.model_dump(mode="json", exclude={"output", "model", "source", "template"}),
        "sources": [[file.name, known] for file, known in zip(files, identities, strict=True)],
        "tokenizer": tokenizer.fingerprint(),
        "template": template,
    }
    fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return Plan(config, files, identities, tokenizer, template, fingerprint)


@contextmanager
def opened(plan: Plan) -> Iterator[Work]:
    """Read through the sources and open a folder that takes the output's place when the block ends well.

    Raises:
        UserError: a source is damaged, or its fields are those of no known format.
    """
    config = plan.config
    with replaced_folder(Path(config.output), contents=CONTENTS) as staging:
        spool = staging / _SPOOL
        sources = []
        for number, (file, known) in enumerate(zip(plan.files, plan.identities, strict=True)):
            local = fetch(file, spool / str(number))
            path = as_json(local, spool / str(number))
            chunks = cut(path, source=file.name, rows_per_chunk=config.records_per_shard)
            sha256 = file_hash(local) if file.remote else known
            sources.append(Source(file.name, sha256, _format(config, chunks[0]), chunks))
        for folder in (*SPLITS, _REJECTS):
            (staging / folder).mkdir()
        yield Work(plan, sources, staging)
        shutil.rmtree(spool, ignore_errors=True)


def run(work: Work, *, progress: Progress = lambda name: nullcontext(_no_advance)) -> None:
    """Fill the staging folder; Ray is initialised.

    Raises:
        UserError: no record is valid, or too many are not.
    """
    items = work.items()
    settings = Settings(
        config=work.plan.config,
        template=work.plan.template,
        special_tokens=work.plan.tokenizer.special_tokens,
        is_canonical=work.plan.tokenizer.is_canonical(),
        staging=work.staging,
    )
    with progress("validate") as advance:
        checks = _map(items, _check_chunk, settings, total=work.num_rows, advance=advance)
    _refuse_too_many(work, [check["dropped"] for check in checks])
    skipped = _duplicates(checks) if work.plan.config.duplicates == "drop" else {}
    items = [
        {**item, "duplicates": skipped.get(item["index"], []), "hashes": check["hashes"]}
        for item, check in zip(items, checks, strict=True)
    ]
    with progress("tokenize") as advance:
        reports = _map(items, _write_chunk, settings, total=work.num_rows, advance=advance)
    dropped = [{r: n for r, n in report["dropped"].items() if r != DUPLICATE} for report in reports]
    _refuse_too_many(work, dropped)
    _merge_rejects(work.staging)
    manifest = _manifest(work, reports)
    if not sum(split["records"] for split in manifest["splits"].values()):
        raise UserError(_table(f"{_names(work)}: no record among {work.num_rows:,} is valid", dropped, work))
    (work.staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


# --- the two passes ---


def _map(
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


def _check_chunk(item: dict[str, Any], *, settings: Settings) -> dict[str, Any]:
    """Validate a chunk; its records' hashes, zeros where there is none."""
    outcomes = _read(item, settings)
    hashes = (o.record.content_hash()[: 2 * _HASH_BYTES] if o.record else "0" * 2 * _HASH_BYTES for o in outcomes)
    dropped = _counted(outcome for outcome in outcomes if outcome.record is None)
    report = {"index": item["index"], "rows": len(outcomes), "dropped": dropped}
    return {"report": json.dumps(report), "hashes": bytes.fromhex("".join(hashes))}


def _write_chunk(item: dict[str, Any], *, settings: Settings) -> dict[str, Any]:
    """Validate, tokenize and pack a chunk, and write its shards and its rejects."""
    config, index = settings.config, int(item["index"])
    outcomes = _read(item, settings)
    copies = set(item["duplicates"])
    hashes = [item["hashes"][start : start + _HASH_BYTES].hex() for start in range(0, len(item["hashes"]), _HASH_BYTES)]
    places = [place for place, outcome in enumerate(outcomes) if outcome.record and place not in copies]
    kept = [outcomes[place] for place in places]
    encoded = encode_records(
        [outcome.record for outcome in kept if outcome.record],
        template=template_from_json(settings.template),
        tokenizer=_tokenizer(config.model),
        max_length=config.max_length,
        truncation=config.truncation,
        is_canonical=settings.is_canonical,
    )
    documents: dict[str, list[Tokens]] = {split: [] for split in SPLITS}
    rejects = [(o, "dropped", reason) for o in outcomes if o.record is None for reason in o.reasons[:1]]
    rejects += [(outcomes[place], "dropped", DUPLICATE) for place in copies]
    for place, outcome, of_record in zip(places, kept, encoded, strict=True):
        rejects += [(outcome, "repaired", reason) for reason in outcome.reasons]
        if isinstance(of_record, TooLong):
            rejects.append((outcome, "dropped", of_record.reason))
            continue
        if of_record[0].is_cut:
            rejects.append((outcome, "repaired", f"longer than max_length={config.max_length}, cut"))
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
        _write_rejects(settings.staging, index, json.loads(item["chunk"])["source"], rejects)
    except OSError as error:
        raise UserError(f"output={config.output!r} cannot be written: {error}") from None
    report = {
        "index": index,
        "rows": len(outcomes),
        "shards": shards,
        "dropped": _count_reasons(rejects, "dropped"),
        "repaired": _count_reasons(rejects, "repaired"),
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


def _read(item: dict[str, Any], settings: Settings) -> list[Outcome]:
    """The chunk's rows, validated.

    Raises:
        UserError: with on_invalid='fail', at the first that is not valid as it stands.
    """
    config, chunk = settings.config, Chunk(**json.loads(item["chunk"]))
    reader = RowReader(item["format"], config.fields, settings.special_tokens)
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
def _tokenizer(model: str) -> Tokenizer:
    """Loaded once per worker process, which works on many chunks and remembers their words."""
    return load_tokenizer(model_folder(model))


# --- between and after them ---


def _duplicates(checks: list[dict[str, Any]]) -> dict[int, list[int]]:
    """By chunk, the places of records that an earlier row holds already."""
    hashes = np.frombuffer(b"".join(check["hashes"] for check in checks), dtype=f"S{_HASH_BYTES}")
    valid = np.flatnonzero(hashes != b"")
    _, first = np.unique(hashes[valid], return_index=True)  # of equals, the first
    copies = np.delete(valid, first)
    starts = np.cumsum([0, *(check["rows"] for check in checks)])
    chunk_of = np.searchsorted(starts, copies, side="right") - 1
    found: dict[int, list[int]] = {}
    for chunk, place in zip(chunk_of.tolist(), (copies - starts[chunk_of]).tolist(), strict=True):
        found.setdefault(checks[chunk]["index"], []).append(place)
    return found


def _format(config: PrepareConfig, first: Chunk) -> RecordFormat:
    if config.format != "auto":
        return config.format
    rows = read_chunk(first)
    found = detect_format(rows, config.fields)
    if found:
        return found
    fields = next((sorted(row) for row in rows if isinstance(row, dict)), None)
    known = "; ".join(f"{name}: {', '.join(names)}" for name, names in FIELDS.items())
    raise UserError(
        f"source={first.source!r}: its records have "
        + (f"the fields {', '.join(fields)}" if fields else "no fields")
        + f", which no format has ({known}); name them with fields={{instruction: …, output: …}}, or set format"
    )


def _refuse_too_many(work: Work, dropped: list[dict[str, Any]]) -> None:
    limit = work.plan.config.max_rejected
    count = sum(number for reasons in dropped for number, _ in reasons.values())
    if count > limit * work.num_rows:
        share = f"{count:,} of {work.num_rows:,} records ({count / work.num_rows:.1%}) are not valid"
        title = f"{_names(work)}: {share}, and max_rejected={limit:g} allows {limit:.1%}"
        raise UserError(_table(title, dropped, work) + "\nmend them, or raise max_rejected")


def _table(title: str, dropped: list[dict[str, Any]], work: Work) -> str:
    totals: dict[str, list[Any]] = {}
    sources = [source.name for source in work.sources for _ in source.chunks]
    for source, reasons in zip(sources, dropped, strict=True):
        for reason, (number, row) in reasons.items():
            totals.setdefault(reason, [0, f"{Path(source).name} row {row}"])[0] += number
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])
    lines = [f"  {number:>9,}  {reason}, first in {where}" for reason, (number, where) in ranked]
    return "\n".join([title, *lines])


def _names(work: Work) -> str:
    return ", ".join(source.name for source in work.sources[:3]) + (" and others" if len(work.sources) > 3 else "")


def _counted(outcomes: Iterator[Outcome]) -> dict[str, list[int]]:
    """By reason, how many rows and the first of them."""
    return _count_reasons([(outcome, "dropped", outcome.reasons[0]) for outcome in outcomes], "dropped")


def _count_reasons(rejects: list[tuple[Outcome, str, str]], action: str) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    for outcome, of_action, reason in rejects:
        if of_action == action:
            counts.setdefault(reason, [0, outcome.row])[0] += 1
    return counts


def _write_rejects(staging: Path, index: int, source: str, rejects: list[tuple[Outcome, str, str]]) -> None:
    if not rejects:
        return
    rows = [
        {"source": source, "row": outcome.row, "action": action, "reason": reason, "record": _as_text(outcome.raw)}
        for outcome, action, reason in sorted(rejects, key=lambda item: item[0].row)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_REJECT_SCHEMA), staging / _REJECTS / f"{index:05d}.parquet")


def _as_text(raw: Any) -> str:
    text = raw.text if isinstance(raw, Unreadable) else json.dumps(raw, ensure_ascii=False)
    return text.encode(errors="replace").decode()


def _merge_rejects(staging: Path) -> None:
    """One file of all, a chunk at a time."""
    with pq.ParquetWriter(staging / REJECTED, _REJECT_SCHEMA, compression="zstd") as writer:
        for part in sorted((staging / _REJECTS).iterdir()):
            writer.write_table(pq.read_table(part))
    shutil.rmtree(staging / _REJECTS)


def _manifest(work: Work, reports: list[dict[str, Any]]) -> dict[str, Any]:
    plan = work.plan
    shards = [shard for report in reports for shard in report["shards"]]
    summed = ("rows", "records", "tokens", "loss_tokens", "cut")
    return {
        "format": FORMAT,
        "version": __version__,
        "fingerprint": plan.fingerprint,
        "config": plan.config.model_dump(mode="json"),
        "sources": [
            {"name": source.name, "sha256": source.sha256, "format": source.format, "rows": source.num_rows}
            for source in work.sources
        ],
        "tokenizer_hash": plan.tokenizer.fingerprint(),
        "vocab_size": plan.tokenizer.vocab_size,
        "template": plan.template,
        "rows": work.num_rows,
        "rejected": _totals(reports, "dropped"),
        "repaired": _totals(reports, "repaired"),
        "splits": {
            split: {key: sum(shard[key] for shard in shards if shard["split"] == split) for key in summed}
            for split in SPLITS
        },
        "shards": shards,
    }


def _totals(reports: list[dict[str, Any]], action: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update({reason: number for reason, (number, _) in report[action].items()})
    return dict(counts.most_common())


def _no_advance(done: int, total: int) -> None:
    pass
