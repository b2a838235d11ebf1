"""Deltas as folders: listed, merged, told apart from their bases."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from app.cli import main
from app.config import ExtraBlockConfig, LoraConfig, MethodConfig, PrefixConfig
from app.config.transfer import MergeConfig
from app.data.batches import Batch
from app.data.tokenization import load_tokenizer
from app.errors import UserError
from app.methods import apply_method
from app.methods.delta import Delta, write_delta
from app.methods.transfer import find_deltas, merge, summary
from app.models.checkpoints import load_decoder, read_provenance, weights_hash
from app.models.decoder import Decoder
from app.training.loss import masked_nll
from app.training.optimizer import trained_parameters

TEMPLATE = {"type": "alpaca"}


def trained_delta(folder: Path, base: Path, method: MethodConfig, batches: list[Batch]) -> Decoder:
    """A few steps of `method`, written to `folder`; returns the unmerged model."""
    model = load_decoder(base)
    apply_method(model, method)
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-2)
    for batch in batches[:3]:
        masked_nll(model, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    metadata = {
        "base": str(base),
        "base_hash": weights_hash(base),
        "tokenizer_hash": load_tokenizer(base).fingerprint(),
        "template": TEMPLATE,
        "metrics": {"eval_loss": 1.25},
    }
    folder.mkdir(parents=True)
    write_delta(folder, Delta(method, {n: p.detach() for n, p in trained_parameters(model).items()}, metadata))
    return model.eval()


@pytest.mark.parametrize("method", [LoraConfig(rank=4, dora=True), ExtraBlockConfig()], ids=lambda method: method.type)
def test_a_merged_folder_opens_in_transformers_with_the_same_logits(
    method: MethodConfig, tiny_model: Path, tmp_path: Path, batches: list[Batch]
) -> None:
    model = trained_delta(tmp_path / "delta", tiny_model, method, batches)
    merged = merge(MergeConfig(delta=str(tmp_path / "delta"), output=str(tmp_path / "merged")))
    assert merged.largest_difference < 1e-4 < merged.largest_logit
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    ids = batches[0].input_ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.head(model(ids)), atol=1e-4, rtol=1e-4)
    assert load_tokenizer(tmp_path / "merged").fingerprint() == load_tokenizer(tiny_model).fingerprint()
    assert read_provenance(tmp_path / "merged")["template"] == TEMPLATE


def test_a_technique_without_equal_in_plain_weights_is_not_merged(
    tiny_model: Path, tmp_path: Path, batches: list[Batch]
) -> None:
    trained_delta(tmp_path / "delta", tiny_model, PrefixConfig(length=3), batches)
    with pytest.raises(UserError, match="'prefix' cannot be merged: no weights of a plain model"):
        merge(MergeConfig(delta=str(tmp_path / "delta"), output=str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()


def test_a_delta_is_not_merged_into_another_base(tiny_model: Path, tmp_path: Path, batches: list[Batch]) -> None:
    trained_delta(tmp_path / "delta", tiny_model, LoraConfig(rank=4), batches)
    with pytest.raises(UserError, match="does not belong to the model: it was trained with base_hash"):
        merge(MergeConfig(delta=str(tmp_path / "delta"), output=str(tmp_path / "merged"), model="embedded"))


def test_a_folder_with_other_things_is_not_replaced(tiny_model: Path, tmp_path: Path, batches: list[Batch]) -> None:
    trained_delta(tmp_path / "delta", tiny_model, LoraConfig(rank=4), batches)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.md").write_text("mine")
    with pytest.raises(UserError, match="thesis.md"):
        merge(MergeConfig(delta=str(tmp_path / "delta"), output=str(tmp_path / "merged")))
    assert (tmp_path / "merged" / "thesis.md").read_text() == "mine"


def test_what_is_read_is_not_replaced(tiny_model: Path, tmp_path: Path, batches: list[Batch]) -> None:
    trained_delta(tmp_path / "delta", tiny_model, LoraConfig(rank=4), batches)
    for output in (tiny_model, tmp_path / "delta", tmp_path / "delta/inside"):
        with pytest.raises(UserError, match="is what is read from, or in it; name another folder"):
            merge(MergeConfig(delta=str(tmp_path / "delta"), output=str(output)))


def test_deltas_below_a_folder_are_listed_and_a_damaged_one_says_so(
    tiny_model: Path, tmp_path: Path, batches: list[Batch]
) -> None:
    trained_delta(tmp_path / "runs/a/delta", tiny_model, LoraConfig(rank=4), batches)
    trained_delta(tmp_path / "runs/b/delta", tiny_model, PrefixConfig(length=3), batches)
    (tmp_path / "runs/b/delta/delta.safetensors").write_bytes(b"rubbish")
    first, second = map(summary, find_deltas(tmp_path / "runs"))
    assert first["method"] == "lora"
    assert first["parameters"] == 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 64) + (64 + 32))
    assert first["eval_loss"] == 1.25
    assert "damaged" in str(second["problem"])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["pacos", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0


def test_the_commands_print_what_they_did(
    tiny_model: Path, tmp_path: Path, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    trained_delta(tmp_path / "runs/a/delta", tiny_model, LoraConfig(rank=4), batches)
    run(monkeypatch, "deltas", str(tmp_path / "runs"))
    assert "lora" in capsys.readouterr().out
    run(monkeypatch, "merge", f"delta={tmp_path}/runs/a/delta", f"output={tmp_path}/merged")
    assert "largest logit difference" in capsys.readouterr().out
    run(monkeypatch, "export", "--format", "peft", f"delta={tmp_path}/runs/a/delta", f"output={tmp_path}/peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["peft_type"] == "LORA"
    run(monkeypatch, "import", f"source={tmp_path}/peft", f"model={tiny_model}", f"output={tmp_path}/again")
    assert "Imported lora" in capsys.readouterr().out
    run(monkeypatch, "describe", "gpt2", "method.type=prefix", "method.length=50")
    assert "921,600 of 125,361,408 weights train" in capsys.readouterr().out
