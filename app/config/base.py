"""What all settings share: the frozen base class, and the types of fields that recur. Knows no job."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from app.errors import masked

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv")
"""Of files of records; `.gz` may stand behind."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
AttentionBackend = Literal["auto", "flash", "memory_efficient", "math", "flex"]


def _absolute(path: str) -> str:
    # Ray's workers run in directories of their own, where a relative path would mean another file.
    if "://" in path:
        raise ValueError("object stores are not supported yet; name a path, on a disk that all nodes share")
    if not path:
        raise ValueError("names no path")
    return str(Path(path).expanduser().absolute())


def _absolute_folder(name: str) -> str:
    is_folder = name.startswith((".", "~")) or (name != "embedded" and Path(name).is_dir())
    return _absolute(name) if is_folder else name


def _source(name: str) -> str:
    if "://" in name:
        return name
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and not _is_data_file(name)
    return name if is_hub_name and not Path(name).exists() else _absolute(name)


def _storage(name: str) -> str:
    if name.startswith("file://"):
        return _absolute(name.removeprefix("file://"))
    return name if "://" in name else _absolute(name)


def _is_data_file(name: str) -> bool:
    return name.removesuffix(".gz").endswith((*DATA_SUFFIXES, ".txt", ".md"))


Masked = PlainSerializer(masked, when_used="json")
"""Of a URI: what is written to files and shown has its password masked."""
LocalPath = Annotated[str, AfterValidator(_absolute)]
"""A file or folder; a relative one is taken from the directory that the configuration is read in."""
StorageName = Annotated[str, AfterValidator(_storage), Masked]
"""A folder, or a URI of an object store."""
ModelName = Annotated[str, AfterValidator(_absolute_folder)]
"""`embedded`, a folder, or a Hugging Face name."""
SourceName = Annotated[str, AfterValidator(_source), Masked]
"""A file, a glob, an object store's URI, or the name of a dataset on the Hugging Face hub."""


SearchMode = Literal["hybrid", "dense", "words"]
"""How passages are found: by meaning (embeddings), by words (BM25), or by both lists together."""
VectorKind = Literal["auto", "flat", "hnsw", "ivf_pq"]
"""How vectors are searched: one by one, exactly; along a graph; compressed, in lists. auto goes by their number."""


class Config(BaseModel):
    """Base of all settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
