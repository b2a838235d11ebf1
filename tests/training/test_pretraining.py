"""`pacos pretrain` on the session's Ray cluster."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from app.config import PretrainConfig
from app.data.tokenization import load_tokenizer
from app.errors import UserError
from app.models.checkpoints import load_decoder, save_decoder
from app.models.quantization import QuantizationConfig, quantize
from app.tracking.store import open_store
from app.training.initial_model import with_shape_of_initial
from app.training.loop import Metrics
from app.training.pretraining import first_model, load_corpus, pretrain

STEPS, EVAL_EVERY = 9, 3


def continued(source: Path, model: Path, **settings: object) -> PretrainConfig:
    """Six steps from `model`."""
    return PretrainConfig.model_validate(
        {
            "sources": [str(source)],
            "output": "runs/continued",
            "initial_model": str(model),
            "batch_size": 4,
            "steps": 6,
            "eval_every": 3,
            "optimizer": {"learning_rate": 1e-3, "schedule": "trapezoid", "final_fraction": 0.0},
            "workers": {"count": 2, "cpus": 0.5},
            **settings,
        }
    )


def config(source: Path, output: Path) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "sources": [str(source)],
            "output": str(output),
            "vocab_size": 300,
            "context_length": 32,
            "num_layers": 1,
            "num_heads": 2,
            "width": 32,
            "batch_size": 4,
            "steps": STEPS,
            "eval_every": EVAL_EVERY,
            "optimizer": {"learning_rate": 1e-2},
            "workers": {"count": 2, "cpus": 0.5},
        }
    )


@pytest.fixture(scope="module")
def first(
    ray_cluster: None, small_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, list[Metrics]]:
    """A run from scratch: its summary, its metrics."""
    seen: list[Metrics] = []
    return pretrain(config(small_source, tmp_path_factory.mktemp("first") / "run"), on_metrics=seen.append), seen


@pytest.mark.ray
@pytest.mark.slow
def test_text_becomes_a_tokenizer_and_a_model(first: tuple[dict, list[Metrics]], tracking_store: str) -> None:
    summary, seen = first
    losses = [row["eval_loss"] for row in seen if "eval_loss" in row]
    assert len(losses) == 1 + STEPS // EVAL_EVERY and losses == sorted(losses, reverse=True)
    assert summary["step"] == STEPS and summary["eval_loss"] == losses[-1]
    assert 0 < summary["bits_per_byte"] < 8
    folder = Path(summary["result"])
    model, tokenizer = load_decoder(folder), load_tokenizer(folder)
    assert tokenizer.vocab_size == 300 == model.config.vocab_size
    with torch.no_grad():
        from transformers import AutoModelForCausalLM

        ids = torch.tensor([tokenizer.encode("An adult alpaca")])
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(model.head(model(ids)), theirs, atol=1e-4, rtol=0)
    output = folder.parent
    assert (output / "loss.png").exists() and "Throughput" in (output / "report.html").read_text()
    run = open_store(tracking_store).get_run(summary["mlflow_run"])
    assert run.info.status == "FINISHED" and run.data.metrics["eval_loss"] == pytest.approx(losses[-1])
    assert summary["tokens"] == STEPS * 4 * 32 and summary["worker_hours"] > 0


def test_a_source_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.txt"):
        pretrain(config(tmp_path / "absent.txt", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_it_goes_on_from_a_model_with_its_shape_its_weights_and_its_tokenizer(
    tiny_model: Path, small_source: Path
) -> None:
    config = with_shape_of_initial(continued(small_source, tiny_model, width=32))
    assert (config.vocab_size, config.context_length, config.num_layers, config.mlp_width) == (400, 96, 2, 64)
    corpus = load_corpus(config)
    assert corpus.tokenizer.fingerprint() == load_tokenizer(tiny_model).fingerprint()
    assert corpus.train.row_length == 96
    started, theirs = first_model(config, corpus.tokenizer), load_decoder(tiny_model)
    assert started.config == theirs.config
    for name, weight in started.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name])


def test_a_shape_that_is_not_the_models_is_refused_before_anything_starts(
    tiny_model: Path, small_source: Path, tmp_path: Path
) -> None:
    config = continued(small_source, tiny_model, num_layers=3, output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"num_layers=3, but initial_model='.*' has 2; leave num_layers out"):
        pretrain(config)
    assert not (tmp_path / "run").exists()


def test_a_shape_that_does_not_suit_the_default_one_may_be_said_with_the_model(tiny_model: Path) -> None:
    with pytest.raises(ValidationError, match="width=32 must be a multiple of num_heads=5"):
        PretrainConfig.model_validate({"sources": ["a.txt"], "output": "runs/a", "width": 32})
    assert with_shape_of_initial(continued(Path("a.txt"), tiny_model, width=32)).num_heads == 2


def test_a_quantized_model_is_not_gone_on_from(tiny_model: Path, small_source: Path, tmp_path: Path) -> None:
    model, scheme = load_decoder(tiny_model), QuantizationConfig(scheme="int8_weight")
    quantize(model, scheme)
    save_decoder(tmp_path, model, quantization=scheme)
    with pytest.raises(UserError, match="is quantized"):
        with_shape_of_initial(continued(small_source, tmp_path))


@pytest.mark.ray
@pytest.mark.slow
def test_going_on_lowers_the_loss_from_where_it_stood(
    first: tuple[dict, list[Metrics]], small_source: Path, tmp_path: Path
) -> None:
    seen: list[Metrics] = []
    settings = {"output": str(tmp_path / "again"), "workers": {"count": 1, "cpus": 0.5}}
    again = continued(small_source, Path(first[0]["result"]), **settings)
    summary = pretrain(again, on_metrics=seen.append)
    # the model is stored in bf16
    assert seen[0]["step"] == 0 and seen[0]["eval_loss"] == pytest.approx(first[0]["eval_loss"], abs=0.02)
    assert summary["eval_loss"] < seen[0]["eval_loss"]
    assert seen[-1]["learning_rate"] == 0.0
