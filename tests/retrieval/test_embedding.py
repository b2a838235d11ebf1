import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.errors import UserError
from app.retrieval.embedding import Embedder, embedder_hash
from app.retrieval.static_model import is_static


def test_vectors_have_length_one_and_equal_texts_are_equal(tiny_embedder: Path) -> None:
    embedder = Embedder(str(tiny_embedder))
    vectors = embedder.embed(["hay each day", "a good fleece", "HAY each day!"])
    assert vectors.shape == (3, 64) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.allclose(vectors[0], vectors[2], atol=1e-6)  # uncased, and punctuation says nothing


def test_a_text_of_unknown_characters_and_no_text_give_zeros(tiny_embedder: Path) -> None:
    embedder = Embedder(str(tiny_embedder))
    assert not embedder.embed(["", "漢字", "?!"]).any()
    assert embedder.embed([]).shape == (0, 64)


@pytest.mark.parametrize("is_quantized", [True, False])
def test_a_static_model_gives_what_sentence_transformers_gives(
    tiny_embedder: Path, tmp_path: Path, is_quantized: bool
) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(tiny_embedder), device="cpu")
    folder = tiny_embedder
    if not is_quantized:
        theirs.save(str(tmp_path / "plain"), create_model_card=False)
        folder = tmp_path / "plain"
    assert is_static(folder)
    texts = ["hay each day", "", "漢字", "A good fleece. " * 400, "?! fleece"]
    embedder = Embedder(str(folder))
    assert np.allclose(embedder.embed(texts), theirs.encode(texts), atol=1e-6)
    ids = [encoding.ids for encoding in theirs.tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert embedder.count_tokens(texts) == list(map(len, ids))
    assert embedder.max_tokens is None


def test_a_static_model_with_more_to_it_is_left_to_sentence_transformers(tiny_embedder: Path, tmp_path: Path) -> None:
    plain = Embedder(str(tiny_embedder)).embed(["fleece"])
    copy = tmp_path / "copy"
    shutil.copytree(tiny_embedder, copy)
    settings = json.loads((copy / "config_sentence_transformers.json").read_text())
    settings |= {"prompts": {"query": "hay each day: "}, "default_prompt_name": "query"}
    (copy / "config_sentence_transformers.json").write_text(json.dumps(settings))
    assert not is_static(copy)
    assert not np.allclose(Embedder(str(copy)).embed(["fleece"]), plain, atol=1e-2)


def test_the_hash_follows_weights_and_tokenizer(tiny_embedder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_embedder, copy)
    assert embedder_hash(copy) == embedder_hash(tiny_embedder)
    (copy / "README.md").write_text("shapes no embedding")
    assert embedder_hash(copy) == embedder_hash(tiny_embedder)
    tokenizer = next(copy.rglob("tokenizer.json"))
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert embedder_hash(copy) != embedder_hash(tiny_embedder)


def test_folders_that_hold_no_such_model_are_refused(tiny_embedder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Embedder(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"lacks modules\.json"):
        Embedder(str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_embedder, copy)
    weights = next(copy.rglob("*.safetensors"))
    weights.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        Embedder(str(copy))
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UserError, match="pickled ones are not loaded"):
        Embedder(str(copy))


def test_code_beside_a_model_is_not_run(tiny_embedder: Path, tmp_path: Path) -> None:
    copy, mark = tmp_path / "copy", tmp_path / "ran"
    shutil.copytree(tiny_embedder, copy)
    (copy / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Module: ...\n")
    modules = json.loads((copy / "modules.json").read_text())
    modules[0]["type"] = "evil.Module"
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="cannot be loaded"):
        Embedder(str(copy))
    assert not mark.exists()


def test_retrieval_is_imported_without_ray_or_models() -> None:
    check = (
        "import sys, app.retrieval.search, app.retrieval.documents\n"
        "heavy = {'ray', 'torch', 'faiss', 'sentence_transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
