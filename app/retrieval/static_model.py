"""A static sentence-transformers model, read without that library: a text's vector is the mean of its tokens' vectors.

The library, and torch and transformers with it, take eight seconds of a CPU to import, in the job and in each replica,
for a look-up and a mean. Knows the layouts that it reads; what is of another is left to the library.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from tokenizers import Encoding, Tokenizer


class StaticModel:
    """The model in `folder`, in memory as float32 [vocab, width]; it computes on the CPU, which it hardly uses."""

    max_tokens: int | None = None
    """None: every text is read to its end."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._vectors = _token_vectors(folder)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), width]; zeros for a text without tokens."""
        means = np.zeros((len(texts), self._vectors.shape[1]), dtype=np.float32)
        for mean, encoding in zip(means, self._encodings(texts), strict=True):
            if encoding.ids:
                self._vectors[encoding.ids].mean(axis=0, out=mean)
        return means

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(encoding.ids) for encoding in self._encodings(texts)]

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)


def is_static(folder: Path) -> bool:
    """Whether `folder` holds a static model of a layout that is read here."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        settings = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
        has_prompt = settings.get("default_prompt_name") is not None
        with safe_open(folder / "model.safetensors", framework="np") as weights:
            layout = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  no dict
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):
        return False
    # Whoever asks gives vectors length one, so whether the model itself does changes nothing.
    is_mean_alone = kinds in (["StaticEmbedding"], ["StaticEmbedding", "Normalize"]) and not modules[0]["path"]
    return is_mean_alone and not has_prompt and layout in (_PLAIN, _QUANTIZED)


_PLAIN = {"embedding.weight": "F32"}
_QUANTIZED = {"embeddings": "I8", "weights": "F32"}
"""As model2vec writes them: int8, and each token's factor."""


def _token_vectors(folder: Path) -> np.ndarray:
    stored = load_file(folder / "model.safetensors")
    if stored.keys() == _PLAIN.keys():
        return stored["embedding.weight"]
    return stored["embeddings"].astype(np.float32) * stored["weights"][:, None]
