"""Passages in a better order: a cross-encoder reads question and passage together, which is slower and knows more than
comparing their embeddings (Nogueira and Cho 2019, arXiv:1901.04085). Of a sentence-transformers CrossEncoder."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.assets import model_folder
from app.errors import UserError
from app.foreign_json import read_json
from app.retrieval.search import Passage

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

_SETTING = "retriever.reranker"


class Reranker:
    """`name` is a folder or a Hugging Face name.

    Raises:
        UserError: the model is not to be had, or is not one that gives a pair of texts one score.
    """

    def __init__(self, name: str) -> None:
        self._model = _load(name)

    def ranked(self, question: str, passages: Sequence[Passage]) -> list[Passage]:
        """Best first, with the model's score, 0 to 1, in place of their own."""
        if not passages:
            return []
        pairs = [(question, f"{passage.title}\n\n{passage.text}") for passage in passages]
        scores = self._model.predict(pairs, show_progress_bar=False)
        scored = [replace(passage, score=float(score)) for passage, score in zip(passages, scores, strict=True)]
        return sorted(scored, key=lambda passage: -passage.score)


def reranker_folder(name: str) -> Path:
    """Where the reranker `name` lies on disk, fetched from the hub if need be.

    Raises:
        UserError: it is not to be had, or its files are not those of a cross-encoder in safetensors.
    """
    folder = model_folder(name, embedded=None, setting=_SETTING)
    if not any(folder.rglob("*.safetensors")):
        raise UserError(
            f"{_SETTING}={name!r}: {folder} lacks weights as .safetensors; pickled ones are not loaded, because they "
            "can run code"
        )
    _check_kind(folder, name)
    return folder


def _check_kind(folder: Path, name: str) -> None:
    """sentence-transformers gives any other model a head of random weights, with no more than a warning."""
    architectures = _values(folder / "config.json").get("architectures")
    named = architectures if isinstance(architectures, list) else []
    classifies = any(str(architecture).endswith("ForSequenceClassification") for architecture in named)
    saved_as = _values(folder / "config_sentence_transformers.json").get("model_type")
    if not classifies and saved_as != "CrossEncoder":
        raise UserError(
            f"{_SETTING}={name!r}: {folder} is no cross-encoder with one score: its config.json has "
            f"architectures={architectures!r}, none of them for sequence classification; an embedder cannot be one"
        )


def _values(file: Path) -> dict[str, Any]:
    """Empty where there is no such file, or nothing of the kind in it."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _load(name: str) -> "CrossEncoder":
    folder = reranker_folder(name)
    import torch
    from sentence_transformers import CrossEncoder

    try:
        model = CrossEncoder(
            str(folder), device="cpu", local_files_only=True, trust_remote_code=False, activation_fn=torch.nn.Sigmoid()
        )
        score = float(model.predict([("question", "passage")], show_progress_bar=False)[0])
    except Exception as error:  # damaged JSON, weights or tokenizer, several scores: every layer raises its own type
        raise UserError(f"{_SETTING}={name!r}: {folder} is no cross-encoder with one score: {error}") from None
    if not math.isfinite(score):
        raise UserError(f"{_SETTING}={name!r}: {folder} gives {score} for a score")
    return model
