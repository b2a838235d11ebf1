"""`pacos pretrain` on the session's Ray cluster."""

from pathlib import Path

import pytest
import torch

from app.config import PretrainConfig
from app.data.tokenization import load_tokenizer
from app.errors import UserError
from app.models.checkpoints import load_decoder
from app.tracking.store import open_store
from app.training.loop import Metrics
from app.training.pretraining import pretrain

STEPS, EVAL_EVERY = 9, 3


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


@pytest.mark.ray
@pytest.mark.slow
def test_text_becomes_a_tokenizer_and_a_model(
    ray_cluster: None, tracking_store: str, small_source: Path, tmp_path: Path
) -> None:
    seen: list[Metrics] = []
    summary = pretrain(config(small_source, tmp_path / "run"), on_metrics=seen.append)
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
    assert (tmp_path / "run/loss.png").exists() and "Throughput" in (tmp_path / "run/report.html").read_text()
    run = open_store(tracking_store).get_run(summary["mlflow_run"])
    assert run.info.status == "FINISHED" and run.data.metrics["eval_loss"] == pytest.approx(losses[-1])
    assert summary["tokens"] == STEPS * 4 * 32 and summary["worker_hours"] > 0


def test_a_source_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.txt"):
        pretrain(config(tmp_path / "absent.txt", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
