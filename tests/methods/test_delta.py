from pathlib import Path

import pytest
import torch

from app.config import LoraConfig
from app.data.batches import Batch
from app.errors import UserError
from app.methods import apply_method
from app.methods.delta import Delta, apply_delta, check_base, merge_delta, read_delta, write_delta
from app.models.checkpoints import load_decoder
from app.models.decoder import Decoder
from app.training.loss import masked_nll
from app.training.optimizer import trained_parameters

CONFIG = LoraConfig(rank=4, alpha=8)


def batch() -> Batch:
    ids = torch.randint(0, 400, (4, 20), generator=torch.Generator().manual_seed(3))
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids.numel())


def train(model: Decoder, *, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        nll, count = masked_nll(model, batch())
        (nll / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((nll / count).item())
    return losses


@pytest.fixture
def trained(tiny_model: Path) -> Decoder:
    model = load_decoder(tiny_model)
    apply_method(model, CONFIG)
    train(model, steps=10)
    return model


@torch.no_grad()
def test_a_saved_delta_restores_the_model_bit_for_bit(trained: Decoder, tiny_model: Path, tmp_path: Path) -> None:
    weights = {name: parameter.detach() for name, parameter in trained_parameters(trained).items()}
    delta = Delta(CONFIG, weights, {"base": "tiny"})
    write_delta(tmp_path, delta)
    again = read_delta(tmp_path)
    model = load_decoder(tiny_model)
    apply_delta(model, again)
    assert torch.equal(model(batch().input_ids), trained(batch().input_ids))
    assert again.hash == delta.hash
    assert again.metadata["base"] == "tiny"
    merged = load_decoder(tiny_model)
    merge_delta(merged, again)
    torch.testing.assert_close(merged(batch().input_ids), trained(batch().input_ids), atol=1e-4, rtol=1e-4)


def test_dropout_acts_in_training_only(tiny_model: Path) -> None:
    model = load_decoder(tiny_model)
    apply_method(model, LoraConfig(rank=4, dropout=0.5))
    train(model, steps=3)
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(batch().input_ids), model(batch().input_ids))
        model.train()
        assert not torch.equal(model(batch().input_ids), model(batch().input_ids))


def test_a_delta_of_another_base_is_told() -> None:
    delta = Delta(CONFIG, {}, {"base": "a", "base_hash": "1", "tokenizer_hash": "2"})
    check_base(delta, "d", base_hash="1", tokenizer_hash="2")
    with pytest.raises(UserError, match="base_hash='1' and not '9', on the base 'a'"):
        check_base(delta, "d", base_hash="9", tokenizer_hash="2")
    with pytest.raises(UserError, match="base_hash='' and not '1'"):  # one that does not say may belong to any
        check_base(Delta(CONFIG, {}, {"base": "a"}), "d", base_hash="1", tokenizer_hash="2")


def test_a_delta_of_another_shape_and_a_damaged_folder_are_told(
    trained: Decoder, tiny_model: Path, tmp_path: Path
) -> None:
    weights = {name: parameter.detach() for name, parameter in trained_parameters(trained).items()}
    with pytest.raises(UserError, match="does not fit this model"):
        apply_delta(load_decoder(tiny_model), Delta(LoraConfig(rank=2), weights, {}))
    with pytest.raises(UserError, match="lacks delta.json"):
        read_delta(tmp_path)
    write_delta(tmp_path, Delta(CONFIG, weights, {}))
    (tmp_path / "delta.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="damaged"):
        read_delta(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_told(trained: Decoder, tiny_model: Path, value: float) -> None:
    weights = {name: parameter.detach().clone() for name, parameter in trained_parameters(trained).items()}
    name = next(iter(weights))
    weights[name].view(-1)[3] = value
    with pytest.raises(UserError, match=f"{name} holds NaN or infinite weights; train it again"):
        apply_delta(load_decoder(tiny_model), Delta(CONFIG, weights, {}))


@pytest.mark.parametrize("content", ["[1]", '{"method": {"type": "lora"}, "metrics": null}', '{"method": 3}'])
def test_metadata_of_another_kind_is_told(trained: Decoder, tmp_path: Path, content: str) -> None:
    weights = {name: parameter.detach() for name, parameter in trained_parameters(trained).items()}
    write_delta(tmp_path, Delta(CONFIG, weights, {}))
    (tmp_path / "delta.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        read_delta(tmp_path)


def test_a_delta_of_another_version_is_told(trained: Decoder, tmp_path: Path) -> None:
    weights = {name: parameter.detach() for name, parameter in trained_parameters(trained).items()}
    write_delta(tmp_path, Delta(CONFIG, weights, {"template": "pacos"}))
    with pytest.raises(UserError, match="made by another version of pacos; train it again"):
        read_delta(tmp_path)
