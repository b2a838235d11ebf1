"""Where records come from: files, globs, object stores, datasets on the Hugging Face hub. Knows no records.

A source becomes files on disk; a file becomes JSON, as a whole array or a value a line, that `chunks.py` can cut up.
What is JSON already is read where it lies; gzip, Parquet, CSV and remote files are spooled first.
"""

import csv
import glob
import gzip
import hashlib
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from app.config.base import DATA_SUFFIXES
from app.errors import UserError

_GLOB = "*?["
_BY_BUCKET = ("s3", "gs", "gcs")
"""Of which a URI names the bucket, and maybe before an @ who asks."""
_BUFFER_BYTES = 1 << 20
_MOST_GROWTH = 200
"""How many times larger a file may become by unpacking it. Text grows tenfold, records that are much alike some fifty
times; gzip can make it a thousand, and so fill a disk."""


@dataclass(frozen=True)
class SourceFile:
    name: str
    """As people know it: a path, a URI, or a dataset's name and the file in it."""
    path: Path
    """Where it lies, or after `fetch` its copy."""
    remote: str | None = None
    """The URI to fetch it from."""


def find_files(sources: tuple[str, ...]) -> list[SourceFile]:
    """The files that `sources` name, in the order of the sources and by name within one.

    Raises:
        UserError: a source names nothing.
    """
    found = [file for source in sources for file in _find(source)]
    name, times = Counter(file.name for file in found).most_common(1)[0]
    if times > 1:
        raise UserError(f"source={list(sources)!r} names {name!r} twice")
    return found


def identity(file: SourceFile) -> str:
    """What changes when the file's content does: its hash, or of a remote file what the store says of it.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    if file.remote is None:
        return file_hash(file)
    filesystem, path = _filesystem(file.remote)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise UserError(f"source={file.name!r} cannot be reached: {str(error).splitlines()[0]}") from None
    return f"{info.size} bytes of {info.mtime_ns}"


def fetch(file: SourceFile, spool: Path) -> SourceFile:
    """`file` on a disk: itself, or what is remote copied into `spool`, a folder for this file alone."""
    if file.remote is None:
        return file
    filesystem, path = _filesystem(file.remote)
    spool.mkdir(parents=True, exist_ok=True)
    copy = spool / "fetched"
    try:
        with filesystem.open_input_stream(path, compression=None) as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, _BUFFER_BYTES)
    except OSError as error:
        raise UserError(f"source={file.name!r} cannot be copied to {str(copy)!r}: {error}") from None
    return replace(file, path=copy)


def file_hash(file: SourceFile) -> str:
    """SHA-256 of the file's bytes.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    try:
        if not file.path.stat().st_size:
            raise UserError(f"source={file.name!r} is empty")
        with file.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"source={file.name!r} cannot be read: {error.strerror}") from None


def as_json(file: SourceFile, spool: Path, *, most_bytes: int | None = None) -> Path:
    """A JSON file with the records of `file`: its own, or one made in `spool`, a folder for this file alone.

    `most_bytes` is how much gzip within gzip may still unpack; None for what its own size allows.

    Raises:
        UserError: the file is damaged, or of a kind that is not read.
    """
    path, kind = file.path, _kind(file)
    spooled = spool / "records.json"
    try:
        if kind.endswith(".gz"):
            spool.mkdir(parents=True, exist_ok=True)
            inner = spool / "unpacked"
            if most_bytes is None:
                most_bytes = _MOST_GROWTH * path.stat().st_size + _BUFFER_BYTES
            left = _unpack(path, inner, name=file.name, most_bytes=most_bytes)
            packed = replace(file, path=inner, name=file.name.removesuffix(".gz"))
            return as_json(packed, spool / "inner", most_bytes=left)
        if kind == ".parquet":
            return _write_lines(_parquet_rows(path), spooled)
        if kind in (".csv", ".tsv"):
            return _write_lines(_csv_rows(path, delimiter="\t" if kind == ".tsv" else ","), spooled)
    except UnicodeDecodeError as error:
        raise UserError(f"source={file.name!r} is not UTF-8: {error.reason}; convert it with iconv") from None
    except (pa.ArrowException, csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"source={file.name!r} is damaged: {error}") from None
    except OSError as error:  # pyarrow's of a damaged page too; a full disk has a number
        told = f"cannot be unpacked into {str(spool)!r}: {error.strerror}" if error.errno else f"is damaged: {error}"
        raise UserError(f"source={file.name!r} {told}") from None
    return path


def _unpack(path: Path, target: Path, *, name: str, most_bytes: int) -> int:
    """How many of `most_bytes` are left."""
    left = most_bytes
    with gzip.open(path) as source, target.open("wb") as unpacked:
        while block := source.read(_BUFFER_BYTES):
            left -= len(block)
            if left < 0:
                raise UserError(f"source={name!r} becomes more than {_MOST_GROWTH} times larger; unpack it yourself")
            unpacked.write(block)
    return left


# --- finding ---


def _find(source: str) -> list[SourceFile]:
    if source.startswith("hf://"):
        return _find_on_hub(source.removeprefix("hf://").removeprefix("datasets/"))
    if "://" in source:
        return _find_remote(source)
    path = Path(source)
    if path.is_dir():
        raise UserError(f"source={source!r} is a folder; name the files in it, for example '{source}/*.jsonl'")
    if path.exists():
        return [SourceFile(source, path)]
    if any(character in source for character in _GLOB):
        matches = sorted(match for match in glob.glob(source, recursive=True) if Path(match).is_file())
        if not matches:
            raise UserError(f"source={source!r} matches no file")
        return [SourceFile(match, Path(match)) for match in matches]
    if path.is_absolute():
        raise UserError(f"source={source!r}: no such file")
    return _find_on_hub(source)


def _find_remote(uri: str) -> list[SourceFile]:
    filesystem, path = _filesystem(uri)
    scheme, _, rest = uri.partition("://")
    query = "?" + rest.partition("?")[2] if "?" in rest and scheme != "file" else ""
    try:
        if any(character in path for character in "*["):
            folder = path[: min(path.find(c) for c in "*[" if c in path)].rpartition("/")[0]
            infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
            matched = sorted(i.path for i in infos if i.type == fs.FileType.File and fnmatch(i.path, path))
        else:
            matched = [path] if filesystem.get_file_info(path).type == fs.FileType.File else []
    except OSError as error:
        raise UserError(f"source={uri!r} cannot be reached: {str(error).splitlines()[0]}") from None
    if not matched:
        raise UserError(f"source={uri!r}: no such file")
    secret = rest.partition("/")[0].rpartition("@")[0] if scheme in _BY_BUCKET else ""  # KEY:SECRET@BUCKET/…
    remote = f"{scheme}://{secret}{'@' if secret else ''}"
    return [SourceFile(f"{scheme}://{match}", Path(match), remote=f"{remote}{match}{query}") for match in matched]


def _filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    scheme = uri.partition("://")[0]
    if scheme not in (*_BY_BUCKET, "file"):  # others name a host or a container, which a file's path does not have
        raise UserError(f"source={uri!r}: {scheme}:// is not read; s3://, gs:// and file:// are")
    try:
        return fs.FileSystem.from_uri(uri.replace(" ", "%20"))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"source={uri!r} cannot be reached: {str(error).splitlines()[0]}") from None


def _find_on_hub(name: str) -> list[SourceFile]:
    """The training files of a dataset, fetched into the hub's cache. Data files only: no code of a dataset runs."""
    from huggingface_hub import hf_hub_download, list_repo_files

    revision = None
    try:
        files = _training_files(list_repo_files(name, repo_type="dataset"))
        if not files:  # a dataset that is made by a script: the hub keeps a Parquet copy of it
            revision = "refs/convert/parquet"
            files = _training_files(list_repo_files(name, repo_type="dataset", revision=revision))
        paths = [hf_hub_download(name, file, repo_type="dataset", revision=revision) for file in files]
    except Exception as error:  # the hub raises a dozen types, all of them meaning "not to be had"
        raise UserError(
            f"source={name!r}: no such file, and the Hugging Face hub delivered no dataset of that name "
            f"({type(error).__name__})"
        ) from None
    if not paths:
        raise UserError(f"source={name!r}: the dataset holds no JSON, Parquet or CSV file")
    return [SourceFile(f"{name}/{file}", Path(path)) for file, path in zip(files, paths, strict=True)]


def _training_files(files: list[str]) -> list[str]:
    data = sorted(file for file in files if file.removesuffix(".gz").endswith(DATA_SUFFIXES))
    return [file for file in data if "train" in file.lower()] or data


# --- other kinds than JSON ---


def _kind(file: SourceFile) -> str:
    """`.json`, `.parquet`, …, with `.gz` behind it where it is gzipped. Content decides where it can."""
    name = file.name.lower()
    with file.path.open("rb") as stream:
        head = stream.read(4096)
    suffixes = [suffix for suffix in Path(name).suffixes if suffix in (*DATA_SUFFIXES, ".gz")]
    suffix = next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")
    if head[:2] == b"\x1f\x8b":
        return suffix + ".gz"
    if head[:4] == b"PAR1":
        return ".parquet"
    if suffix in (".parquet", ".csv", ".tsv"):
        return suffix
    if suffix or head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
        return ".json"
    raise UserError(f"source={file.name!r} is of no known kind; JSON, JSON Lines, Parquet and CSV are read")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=1000):
        yield from batch.to_pylist()


def _csv_rows(path: Path, *, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream, delimiter=delimiter, strict=True):
            row.pop(None, None)  # values beyond the header's columns
            yield row


def _write_lines(rows: Iterator[dict[str, Any]], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", errors="surrogatepass") as stream:
        for row in rows:
            stream.write(json.dumps(row, default=str) + "\n")
    return file
