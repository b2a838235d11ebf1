"""`pacos prepare`: sources -> valid records -> ids and loss masks -> rows -> Parquet shards and their manifest.

Two passes of Ray Data over chunks of the sources, each chunk read by the task that works on it. The first validates,
so that a mistake is told before the long work, and hashes, so that copies are known wherever they lie; the second
tokenizes, packs and writes. What a chunk becomes depends on the chunk and the configuration alone, never on how many
workers there are or which is first; and memory holds a few chunks, however long the source is.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app import __version__
from app.assets import model_folder
from app.atomic import check_replaceable, replaced_folder, told_if_full
from app.config.data import PrepareConfig, RecordFormat
from app.data.chunks import Chunk, cut, read_chunk
from app.data.passes import DUPLICATE, HASH_BYTES, Advance, Settings, check_chunk, run_pass, write_chunk
from app.data.prompts import resolve_template
from app.data.records import FIELDS, detect_format
from app.data.rejects import PARTS, Counts, merge_parts
from app.data.shards import CONTENTS, FORMAT, MANIFEST, SPLITS, Manifest, read_manifest
from app.data.sources import SourceFile, as_json, fetch, file_hash, find_files, identity
from app.data.tokenization import Tokenizer, load_tokenizer
from app.errors import UserError

Progress = Callable[[str], AbstractContextManager[Advance]]
"""Called with the name of a pass; what it returns is entered for the pass."""

_SPOOL = "spool"


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
    files = find_files(config.source)
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
    output = Path(config.output)
    with told_if_full(output), replaced_folder(output, contents=CONTENTS) as staging:
        spool = staging / _SPOOL
        sources = []
        for number, (file, known) in enumerate(zip(plan.files, plan.identities, strict=True)):
            local = fetch(file, spool / str(number))
            path = as_json(local, spool / str(number))
            chunks = cut(path, source=file.name, rows_per_chunk=config.records_per_shard)
            sha256 = file_hash(local) if file.remote else known
            sources.append(Source(file.name, sha256, _format(config, chunks[0]), chunks))
        for folder in (*SPLITS, PARTS):
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
        tokenizer_hash=work.plan.tokenizer.fingerprint(),
        is_canonical=work.plan.tokenizer.is_canonical(),
        staging=work.staging,
    )
    with progress("validate") as advance:
        checks = run_pass(items, check_chunk, settings, total=work.num_rows, advance=advance)
    _refuse_too_many(work, [check["dropped"] for check in checks])
    skipped = _duplicates(checks) if work.plan.config.duplicates == "drop" else {}
    items = [
        {**item, "duplicates": skipped.get(item["index"], []), "hashes": check["hashes"]}
        for item, check in zip(items, checks, strict=True)
    ]
    with progress("tokenize") as advance:
        reports = run_pass(items, write_chunk, settings, total=work.num_rows, advance=advance)
    dropped = [{r: n for r, n in report["dropped"].items() if r != DUPLICATE} for report in reports]
    _refuse_too_many(work, dropped)
    merge_parts(work.staging)
    manifest = _manifest(work, reports)
    if not sum(split["records"] for split in manifest["splits"].values()):
        raise UserError(_table(f"{_names(work)}: no record among {work.num_rows:,} is valid", dropped, work))
    (work.staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _duplicates(checks: list[dict[str, Any]]) -> dict[int, list[int]]:
    """By chunk, the places of records that an earlier row holds already."""
    hashes = np.frombuffer(b"".join(check["hashes"] for check in checks), dtype=f"S{HASH_BYTES}")
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


def _refuse_too_many(work: Work, dropped: list[Counts]) -> None:
    limit = work.plan.config.max_rejected
    count = sum(number for reasons in dropped for number, _ in reasons.values())
    if count > limit * work.num_rows:
        share = f"{count:,} of {work.num_rows:,} records ({count / work.num_rows:.1%}) are not valid"
        title = f"{_names(work)}: {share}, and max_rejected={limit:g} allows {limit:.1%}"
        raise UserError(_table(title, dropped, work) + "\nmend them, or raise max_rejected")


def _table(title: str, dropped: list[Counts], work: Work) -> str:
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
