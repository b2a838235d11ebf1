"""Greedy answers of a model to held-out prompts, and how near they come to the references. In Ray Data tasks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from app.data.shards import COLUMNS, Manifest
from app.data.tokenization import Tokenizer
from app.engine.engine import Engine
from app.engine.sampling import Sampling
from app.models.decoder import Decoder
from app.training.answer_scores import is_exact_match, rouge_l


@dataclass(frozen=True)
class Answer:
    prompt: str
    reference: str
    answer: str
    """The model's, greedy."""
    rouge_l: float
    is_exact: bool


def first_exchanges(manifest: Manifest, split: str, count: int) -> list[dict[str, list[int]]]:
    """`prompt` and `reference` ids of the first `count` documents: of a conversation its first exchange.

    Documents without a prompt, plain texts, are passed over.
    """
    found: list[dict[str, list[int]]] = []
    for row in _rows(manifest.files(split)) if count else ():
        found += [{"prompt": prompt, "reference": reference} for prompt, reference in _exchanges(row) if prompt]
        if len(found) >= count:
            break
    return found[:count]


def _rows(files: list[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=64, columns=list(COLUMNS)):
            yield from batch.to_pylist()


def _exchanges(row: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    ids, mask, start = np.asarray(row["input_ids"]), np.asarray(row["loss_mask"]), 0
    for length in row["lengths"]:
        document, in_loss = ids[start : start + length], mask[start : start + length]
        first = int(in_loss.argmax())
        last = first + int(np.append(~in_loss[first:], True).argmax())
        yield document[:first].tolist(), document[first:last].tolist()
        start += length


def answer(
    model: Decoder, tokenizer: Tokenizer, exchanges: list[dict[str, list[int]]], *, max_tokens: int
) -> list[Answer]:
    """The model's answers to all prompts, generated together, in the order of `exchanges`."""
    engine = Engine(model, max_batch_size=len(exchanges), max_queue=len(exchanges))
    sampling = Sampling(max_tokens=max_tokens, stop_ids=frozenset([tokenizer.end_id]))
    tokens: dict[int, list[int]] = {engine.add_request(each["prompt"], sampling): [] for each in exchanges}
    while engine.has_work:
        for event in engine.step():
            if event.token is not None:
                tokens[event.request_id].append(event.token)
    return [_scored(tokenizer, each, ids) for each, ids in zip(exchanges, tokens.values(), strict=True)]


def _scored(tokenizer: Tokenizer, exchange: dict[str, list[int]], ids: list[int]) -> Answer:
    prompt, reference, text = (
        tokenizer.decode(part).strip() for part in (exchange["prompt"], exchange["reference"], ids)
    )
    return Answer(prompt, reference, text, rouge_l(text, reference), is_exact_match(text, reference))
