from pathlib import Path

import pytest
import torch

from app.config import LoraConfig
from app.data.batches import Batch
from app.errors import UserError
from app.methods import apply_method, merge_method
from app.methods.delta import Delta, apply_delta, check_base, merge_delta, read_delta, write_delta
from app.models.checkpoints import load_decoder
from app.models.decoder import Decoder, DecoderConfig
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


def test_step_zero_equals_the_base(tiny_model: Path) -> None:
    base, model = load_decoder(tiny_model), load_decoder(tiny_model)
    apply_method(model, CONFIG)
    assert torch.equal(model(batch().input_ids), base(batch().input_ids))


def test_only_the_updates_get_gradients_and_both_factors_move(tiny_model: Path) -> None:
    model = load_decoder(tiny_model)
    apply_method(model, CONFIG)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, steps=2)
    masked_nll(model, batch())[0].backward()
    for name, parameter in model.named_parameters():
        is_update = name.endswith(("lora_a", "lora_b"))
        assert (parameter.grad is not None) == is_update, name
        assert torch.equal(parameter, before[name]) != is_update, name


def test_training_lowers_the_loss(tiny_model: Path) -> None:
    model = load_decoder(tiny_model)
    apply_method(model, CONFIG)
    losses = train(model, steps=20)
    assert losses[-1] < losses[0] - 0.1


@torch.no_grad()
def test_the_merged_model_agrees_with_the_unmerged(trained: Decoder) -> None:
    before = trained.head(trained(batch().input_ids))
    merge_method(trained, CONFIG)
    assert not any("lora" in name for name, _ in trained.named_parameters())
    torch.testing.assert_close(trained.head(trained(batch().input_ids)), before, atol=1e-4, rtol=1e-4)


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


def test_the_delta_holds_the_trained_weights_only(trained: Decoder) -> None:
    # 2 layers x rank 4 x (in + out) of qkv 32->96, out 32->32, up 32->64, down 64->32
    expected = 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 64) + (64 + 32))
    assert sum(parameter.numel() for parameter in trained_parameters(trained).values()) == expected


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LoraConfig(rank=8, targets=("attn.qkv",)), 294_912),
        (LoraConfig(rank=4, targets=("attn.qkv", "attn.out", "mlp.up", "mlp.down")), 589_824),
    ],
)
def test_gpt2_small_gets_exactly_the_expected_number_of_trained_weights(config: LoraConfig, count: int) -> None:
    with torch.device("meta"):
        model = Decoder(DecoderConfig(50257, 1024, num_layers=12, num_heads=12, width=768, mlp_width=3072))
        apply_method(model, config)
    assert sum(parameter.numel() for parameter in trained_parameters(model).values()) == count


def test_dropout_acts_in_training_only(tiny_model: Path) -> None:
    model = load_decoder(tiny_model)
    apply_method(model, LoraConfig(rank=4, dropout=0.5))
    train(model, steps=3)
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(batch().input_ids), model(batch().input_ids))
        model.train()
        assert not torch.equal(model(batch().input_ids), model(batch().input_ids))


def test_a_target_that_matches_nothing_is_told_with_those_that_do(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="'q_proj' matches no layer.*attn.out, attn.qkv, mlp.down, mlp.up"):
        apply_method(load_decoder(tiny_model), LoraConfig(targets=("q_proj",)))


def test_a_rank_beyond_the_width_is_told(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="method.rank=32 must be below 32"):
        apply_method(load_decoder(tiny_model), LoraConfig(rank=32))


def test_a_delta_of_another_base_is_told() -> None:
    delta = Delta(CONFIG, {}, {"base": "a", "base_hash": "1", "tokenizer_hash": "2"})
    check_base(delta, "d", base_hash="1", tokenizer_hash="2")
    with pytest.raises(UserError, match="base_hash='1' and not '9', on the base 'a'"):
        check_base(delta, "d", base_hash="9", tokenizer_hash="2")


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


def test_a_delta_of_another_version_is_told(trained: Decoder, tmp_path: Path) -> None:
    weights = {name: parameter.detach() for name, parameter in trained_parameters(trained).items()}
    write_delta(tmp_path, Delta(CONFIG, weights, {"template": "pacos"}))
    with pytest.raises(UserError, match="made by another version of pacos; train it again"):
        read_delta(tmp_path)
