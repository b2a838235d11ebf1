"""Texts -> unit vectors, by a model of sentence-transformers' format. Knows no chunks, no index and no cluster."""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from app.assets import EMBEDDED_EMBEDDER, model_folder
from app.errors import UserError
from app.retrieval.static_model import StaticModel, is_static


class Embedder:
    """A sentence-transformers model on `device`; `name` is `embedded`, a folder, or a Hugging Face name.

    A static one, as the embedded is, computes on the CPU whatever the device: a copy there would take longer.

    Raises:
        UserError: the model is not to be had, or its folder is not one that sentence-transformers opens.
    """

    def __init__(self, name: str = "embedded", *, device: str = "cpu") -> None:
        self.name = name
        self.folder = embedder_folder(name)
        self._model = _load(self.folder, name, device)
        self.width = int(self._model.encode(["width"]).shape[1])  # its accessor has another name in every version

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), width], each row of length 1; a text without a known token gives a row of zeros."""
        if not texts:
            return np.zeros((0, self.width), dtype=np.float32)
        vectors = self._model.encode(texts)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each of `texts` has; special ones are not counted."""
        return self._model.count_tokens(texts)

    @property
    def max_tokens(self) -> int | None:
        """The longest text that is read to its end; none: as long as it may be."""
        return self._model.max_tokens


class _Model(Protocol):
    @property
    def max_tokens(self) -> int | None: ...

    def encode(self, texts: Sequence[str]) -> np.ndarray: ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]: ...


class _LibrarysModel:
    """Whatever sentence-transformers opens."""

    def __init__(self, folder: Path, device: str) -> None:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(folder), device=device, local_files_only=True, trust_remote_code=False)
        self._model = model.float().eval()
        self._lock = threading.Lock()  # to encode and to count set how the one tokenizer cuts and pads

    @property
    def max_tokens(self) -> int | None:
        longest = self._model.max_seq_length
        return None if longest is None or longest == float("inf") else int(longest)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        with self._lock:
            vectors = self._model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        tokenizer = self._model.tokenizer
        if hasattr(tokenizer, "encode_batch"):  # of the `tokenizers` package, as a static model has it
            return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        with self._lock:
            return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def embedder_folder(name: str, *, setting: str = "embedder") -> Path:
    """Where the embedder `name` lies on disk, fetched from the hub if need be; `setting` is what the user calls it.

    Raises:
        UserError: it is not to be had, or its files are not those of a sentence-transformers model in safetensors.
    """
    folder = model_folder(name, embedded=EMBEDDED_EMBEDDER, setting=setting)
    if not (folder / "modules.json").is_file():
        raise UserError(f"{setting}={name!r}: {folder} lacks modules.json; give a sentence-transformers model")
    if not any(folder.rglob("*.safetensors")):
        raise UserError(
            f"{setting}={name!r}: {folder} lacks weights as .safetensors; pickled ones are not loaded, because they "
            "can run code: save the model again with safe_serialization=True"
        )
    return folder


def embedder_hash(folder: Path) -> str:
    """SHA-256 over every file that shapes an embedding: weights, tokenizer and module settings."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".json", ".safetensors", ".txt", ".model") and file.is_file():
            content = hashlib.sha256(file.read_bytes()).digest()
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()


def _load(folder: Path, name: str, device: str) -> _Model:
    try:
        return StaticModel(folder) if is_static(folder) else _LibrarysModel(folder, device)
    except Exception as error:  # damaged JSON, weights or tokenizer: every layer raises its own type
        raise UserError(f"embedder={name!r}: {folder} cannot be loaded: {error}") from None
