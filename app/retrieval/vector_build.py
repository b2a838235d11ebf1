"""Builds a file of vectors where it hurts nobody. A graph of a million takes minutes and all threads that it is given;
beside torch more than one can crash, and what a server serves must not wait. So that runs in a process of its own."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from app.config.base import VectorKind
from app.retrieval.index import kind_for, write_vectors


def build_vectors(
    file: Path, vectors: np.ndarray, *, ids: np.ndarray | None = None, kind: VectorKind, threads: int
) -> None:
    """As `write_vectors`, with `threads`."""
    kind = kind_for(len(vectors), kind)
    if kind == "flat":  # copying them is all there is to do
        return write_vectors(file, vectors, ids=ids, kind=kind)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".build-") as folder:
        np.save(Path(folder) / "vectors.npy", np.ascontiguousarray(vectors, dtype=np.float32))
        np.save(Path(folder) / "ids.npy", np.arange(len(vectors), dtype=np.int64) if ids is None else ids)
        command = [sys.executable, "-m", __name__, folder, str(file), kind, str(threads)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"building {kind} of {len(vectors)} vectors ended with {done.returncode}: {done.stderr}")


def _main(folder: str, file: str, kind: VectorKind, threads: str) -> None:
    vectors, ids = (np.load(Path(folder) / name, mmap_mode="r") for name in ("vectors.npy", "ids.npy"))
    write_vectors(Path(file), vectors, ids=np.asarray(ids), kind=kind, threads=int(threads))


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
