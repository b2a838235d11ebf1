import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tokenizers import Tokenizer

from app.retrieval.embedding import Embedder
from app.retrieval.static_embedder import StaticEmbedderSettings, save_static_embedder, train_static_embedder

TEXTS = [
    "the cat chased the mouse around the house",
    "the dog chased the cat around the garden",
    "the bank lends money to the merchant",
    "the merchant pays money to the bank",
] * 5
PAIRS = [("feline", TEXTS[0]), ("hound", TEXTS[1]), ("loan", TEXTS[2]), ("payment", TEXTS[3])] * 10
SETTINGS = StaticEmbedderSettings(vocab_size=200, width=16, epochs=30, batch_size=4, learning_rate=3e-2)


def quiet(line: str) -> None:
    """For tests that read no log."""


def cosine(tokenizer: Tokenizer, vectors: np.ndarray, first: str, second: str) -> float:
    a, b = (vectors[tokenizer.encode(text).ids].mean(axis=0) for text in (first, second))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_training_twice_gives_the_same_model() -> None:
    runs = [train_static_embedder(TEXTS, PAIRS, settings=SETTINGS, log=quiet) for _ in range(2)]
    assert runs[0][0].to_str() == runs[1][0].to_str()
    assert np.array_equal(runs[0][1], runs[1][1])


def test_questions_move_to_their_own_passages() -> None:
    texts = [*TEXTS, *(question for question, _ in PAIRS)]
    tokenizer, vectors = train_static_embedder(texts, PAIRS, settings=SETTINGS, log=quiet)
    for question, passage in PAIRS[:4]:
        others = [cosine(tokenizer, vectors, question, other) for _, other in PAIRS[:4] if other != passage]
        assert cosine(tokenizer, vectors, question, passage) > max(others)


def test_punctuation_and_the_unknown_say_nothing() -> None:
    texts = [*TEXTS, "cat, dog. bank! money?"]
    tokenizer, vectors = train_static_embedder(texts, PAIRS, settings=SETTINGS, log=quiet)
    for token in (",", ".", "!", "?", "[UNK]"):
        assert not vectors[tokenizer.token_to_id(token)].any()


def test_what_is_saved_is_what_was_trained_in_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    settings = dataclasses.replace(SETTINGS, epochs=0)
    tokenizer, vectors = train_static_embedder(TEXTS, [], settings=settings, log=quiet)
    save_static_embedder(tmp_path / "model", tokenizer, vectors)
    assert (tmp_path / "model/model.safetensors").stat().st_size < vectors.nbytes / 4 + 4 * len(vectors) + 1000
    stored = SentenceTransformer(str(tmp_path / "model"), device="cpu")[0].embedding.weight.detach().numpy()
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    assert stored.dtype == np.float32 and (np.abs(stored - vectors) <= largest / 254 + 1e-6).all()
    assert not stored[tokenizer.token_to_id("[UNK]")].any()


def test_the_job_writes_a_model_that_opens(tmp_path: Path) -> None:
    records = [{"instruction": f"Tell me about the {word}.", "input": "", "output": passage} for word, passage in PAIRS]
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "more.txt").write_text("\n\n".join(TEXTS))
    options = ["--output", str(tmp_path / "model"), "--vocab-size", "120", "--width", "8", "--epochs", "1"]
    assert job().main([str(tmp_path / "records.json"), str(tmp_path / "more.txt"), *options]) == 0
    assert Embedder(str(tmp_path / "model")).embed(["the cat"]).shape == (1, 8)


def test_the_job_names_a_missing_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job().main([str(tmp_path / "absent.json"), "--output", str(tmp_path / "model")]) == 2
    assert "no such file" in capsys.readouterr().err


def job() -> ModuleType:
    file = Path(__file__).parents[2] / "jobs" / "train_embedder.py"
    spec = importlib.util.spec_from_file_location("train_embedder", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
