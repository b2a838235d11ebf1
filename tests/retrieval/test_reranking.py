"""A tiny real cross-encoder with random weights: which order it gives is known from the model itself."""

import json
import shutil
from pathlib import Path

import pytest

from app.errors import UserError
from app.retrieval.reranking import Reranker, reranker_folder
from app.retrieval.search import Passage, Searcher


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Path:
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder: Path = tmp_path_factory.mktemp("cross-encoder")
    wordpiece = BertWordPieceTokenizer()
    wordpiece.train_from_iterator(list(texts.values()) * 3, vocab_size=300, show_progress=False)
    wordpiece.save(str(folder / "raw.json"))
    tokenizer = BertTokenizerFast(tokenizer_file=str(folder / "raw.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_passages_come_in_the_models_own_order(cross_encoder: Path, index: Path) -> None:
    from sentence_transformers import CrossEncoder

    question = "What does a fleece weigh?"
    found = Searcher(index).search(question, top_k=10)
    ranked = Reranker(str(cross_encoder)).ranked(question, found)
    model = CrossEncoder(str(cross_encoder), device="cpu")
    scores = [float(model.predict([(question, f"{p.title}\n\n{p.text}")])[0]) for p in found]
    expected = [passage.chunk for _, passage in sorted(zip(scores, found, strict=True), key=lambda pair: -pair[0])]
    assert [passage.chunk for passage in ranked] == expected != [passage.chunk for passage in found]
    assert [passage.score for passage in ranked] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    assert all(0 <= passage.score <= 1 for passage in ranked)
    assert Reranker(str(cross_encoder)).ranked(question, []) == []


def test_a_deployment_reads_the_best_ones_again_and_cuts_then(cross_encoder: Path, index: Path) -> None:
    import asyncio

    from app.config import RetrieverConfig
    from app.serving.messages import Retrieved
    from app.serving.retriever import RetrieverDeployment

    def chunks(top_k: int, **values: object) -> list[int]:
        deployment = RetrieverDeployment(RetrieverConfig(index=str(index), **values))  # type: ignore[arg-type]
        found = asyncio.run(deployment.search("What does a fleece weigh?", top_k))
        assert isinstance(found, Retrieved)
        return [passage["chunk"] for passage in found.passages]

    plain, reranked = chunks(4), chunks(4, reranker=str(cross_encoder))
    assert sorted(plain) == sorted(reranked) and plain != reranked
    assert chunks(1, reranker=str(cross_encoder)) == reranked[:1], "the best of all, not of the first"
    two = chunks(4, reranker=str(cross_encoder), rerank=2)
    assert sorted(two[:2]) == sorted(plain[:2]) and two[2:] == plain[2:], "those that it does not read stay behind"


def test_what_is_no_cross_encoder_is_refused(tmp_path: Path, tiny_embedder: Path) -> None:
    with pytest.raises(UserError, match=r"retriever\.reranker=.*no such folder"):
        Reranker(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"lacks weights as \.safetensors"):
        Reranker(str(tmp_path))
    with pytest.raises(UserError, match="no cross-encoder with one score"):
        Reranker(str(tiny_embedder))


def test_an_embedder_is_refused_rather_than_given_a_random_head(cross_encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(cross_encoder).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(cross_encoder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no cross-encoder .*architectures=\['BertModel'\]"):
        Reranker(str(tmp_path))


def test_a_cross_encoder_is_one_as_sentence_transformers_saves_it(cross_encoder: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    CrossEncoder(str(cross_encoder), device="cpu").save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]  # it says itself what it is
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert reranker_folder(str(tmp_path)) == tmp_path


def test_a_passage_is_a_passage_still(cross_encoder: Path, index: Path) -> None:
    (passage, *_) = Reranker(str(cross_encoder)).ranked("hay", Searcher(index).search("hay", top_k=3))
    assert isinstance(passage, Passage) and passage.text and passage.document_id == passage.document


def test_code_beside_a_model_is_not_run(cross_encoder: Path, tmp_path: Path) -> None:
    copy, mark = tmp_path / "copy", tmp_path / "ran"
    shutil.copytree(cross_encoder, copy)
    (copy / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(UserError, match="is no cross-encoder"):
        Reranker(str(copy))
    assert not mark.exists()
