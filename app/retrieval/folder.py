"""The index folder: what it holds, how it is replaced as a whole, and how damage is noticed.

documents.sqlite   documents and chunks, and an index of their words
vectors.faiss      a vector for each chunk
manifest.json      what made them, and their hashes; written last
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from app.atomic import check_replaceable, replaced_folder, told_if_full
from app.config.base import VectorKind
from app.errors import UserError
from app.retrieval.chunking import Chunk, Document
from app.retrieval.store import write_store
from app.retrieval.vector_build import build_vectors

DOCUMENTS, VECTORS, MANIFEST = "documents.sqlite", "vectors.faiss", "manifest.json"
_FILES = (MANIFEST, DOCUMENTS, VECTORS)
FORMAT = 2
"""1 had no index of words."""


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    embedder: str
    """As configured: `embedded`, a folder, or a Hugging Face name."""
    embedder_sha256: str
    """Of the embedder's files; queries must be embedded by the same."""
    width: int
    documents: int
    chunks: int
    chunk_words: int
    overlap_words: int
    documents_sha256: str = ""
    """Of documents.sqlite."""
    vectors_sha256: str = ""
    """Of vectors.faiss: an index file from elsewhere is not safe to load."""


def check_output(folder: Path) -> None:
    """Refuse to replace a folder that is not an index.

    Raises:
        UserError: `folder` is a file, or holds anything that an index does not.
    """
    check_replaceable(folder, _FILES)


def write_index(
    folder: Path,
    *,
    documents: Sequence[Document],
    chunks: Sequence[Chunk],
    vectors: np.ndarray,
    manifest: Manifest,
    kind: VectorKind = "auto",
    threads: int = 1,
) -> Manifest:
    """Write the index, and put it in the place of the old one once it is complete.

    A kill at any moment leaves the old index, the new one or none, never a part. `vectors` [chunks, width] are in the
    order of `chunks`. Returns the manifest with the hashes filled in.
    """
    with told_if_full(folder), replaced_folder(folder.resolve(), contents=_FILES) as staging:
        write_store(staging / DOCUMENTS, documents, chunks)
        build_vectors(staging / VECTORS, vectors, kind=kind, threads=threads)
        hashes = {
            "documents_sha256": file_sha256(staging / DOCUMENTS),
            "vectors_sha256": file_sha256(staging / VECTORS),
        }
        manifest = manifest.model_copy(update=hashes)
        (staging / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete, undamaged index.

    Raises:
        UserError: a file is missing, damaged or of another format; the message says so and names the remedy.
    """
    if not folder.is_dir():
        raise UserError(f"index={str(folder)!r}: no such folder; build it with `pacos index`")
    for name in _FILES:
        if not (folder / name).is_file():
            raise damaged(folder, f"lacks {name}")
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except ValidationError as error:
        raise damaged(folder, f"{MANIFEST} is damaged ({error.errors()[0]['msg']})") from None
    if manifest.format != FORMAT:
        raise damaged(folder, f"{MANIFEST} has format {manifest.format}, but {FORMAT} is due")
    for name, expected in ((DOCUMENTS, manifest.documents_sha256), (VECTORS, manifest.vectors_sha256)):
        if file_sha256(folder / name) != expected:
            raise damaged(folder, f"{name} does not match its hash in {MANIFEST}")
    return manifest


def damaged(folder: Path, problem: str) -> UserError:
    return UserError(f"index={str(folder)!r}: {problem}; build it again with `pacos index`")


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
