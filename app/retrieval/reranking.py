"""Passages in a better order: a cross-encoder reads question and passage together, which is slower and knows more than
comparing their embeddings (Nogueira and Cho 2019, arXiv:1901.04085). Of a sentence-transformers CrossEncoder."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from app.assets import model_folder
from app.errors import UserError
from app.retrieval.search import Passage

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder


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


def _load(name: str) -> "CrossEncoder":
    folder = model_folder(name)
    if not any(folder.rglob("*.safetensors")):
        raise UserError(
            f"reranker={name!r}: {folder} lacks weights as .safetensors; pickled ones are not loaded, because they can "
            "run code"
        )
    import torch
    from sentence_transformers import CrossEncoder

    try:
        model = CrossEncoder(
            str(folder), device="cpu", local_files_only=True, trust_remote_code=False, activation_fn=torch.nn.Sigmoid()
        )
        score = float(model.predict([("question", "passage")], show_progress_bar=False)[0])
    except Exception as error:  # damaged JSON, weights or tokenizer, several scores: every layer raises its own type
        raise UserError(f"reranker={name!r}: {folder} is no cross-encoder with one score: {error}") from None
    if not math.isfinite(score):
        raise UserError(f"reranker={name!r}: {folder} gives {score} for a score")
    return model
