"""Real records as batches, for techniques to train on; no Ray."""

import json
from pathlib import Path

import numpy as np
import pytest

from app.assets import model_folder
from app.data.batches import Batch, collate
from app.data.prompts import PacosTemplate
from app.data.tokenization import load_tokenizer

REPOSITORY = Path(__file__).parents[2]


Record = tuple[np.ndarray, np.ndarray]


def encode_examples(model: Path, *, longest: int) -> list[Record]:
    """The first eighty example records that are short enough: ids, and what of them is in the loss."""
    tokenizer, template = load_tokenizer(model), PacosTemplate()
    found = []
    for line in (REPOSITORY / "examples/instructions.jsonl").open(encoding="utf-8"):
        record = json.loads(line)
        prompt = tokenizer.encode(template.prompt(record["instruction"], record.get("input", "")))
        response = [*tokenizer.encode(f" {record['output']}"), tokenizer.end_id]
        if len(prompt) + len(response) <= longest:
            mask = np.arange(len(prompt) + len(response)) >= len(prompt)
            found.append((np.array(prompt + response), mask))
    return found[:80]


def in_batches(records: list[Record]) -> list[Batch]:
    """Batches of four records, padded."""
    chunks = [records[first : first + 4] for first in range(0, len(records), 4)]
    return [collate(*zip(*chunk, strict=True)) for chunk in chunks]


@pytest.fixture(scope="session")
def records(tiny_model: Path) -> list[Record]:
    return encode_examples(tiny_model, longest=80)


@pytest.fixture(scope="session")
def batches(records: list[Record]) -> list[Batch]:
    return in_batches(records)


@pytest.fixture(scope="session")
def embedded_batches() -> list[Batch]:
    """For the embedded base: twenty, of short records, on which every technique takes a step each."""
    batches = in_batches(encode_examples(model_folder("embedded"), longest=40))
    assert len(batches) == 20
    return batches
