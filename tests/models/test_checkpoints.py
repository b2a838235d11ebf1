import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from app.errors import UserError
from app.models.checkpoints import load_decoder, save_decoder, weights_hash


@pytest.fixture
def gpt2(tmp_path: Path) -> tuple[Path, GPT2LMHeadModel]:
    """A `transformers` GPT-2 with weights of a trained one's size, biases too, and its `save_pretrained` folder."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=211, n_positions=64, n_embd=48, n_layer=3, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2", model


def ids() -> torch.Tensor:
    return torch.randint(0, 211, (3, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_transformers_folder_gives_the_same_logits(gpt2) -> None:
    folder, theirs = gpt2
    ours = load_decoder(folder)
    torch.testing.assert_close(ours.head(ours(ids())), theirs(ids()).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sharded_weights_load_too(gpt2, tmp_path: Path) -> None:
    _, theirs = gpt2
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert (tmp_path / "sharded/model.safetensors.index.json").exists()
    ours = load_decoder(tmp_path / "sharded")
    torch.testing.assert_close(ours.head(ours(ids())), theirs(ids()).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_exported_folder_opens_in_transformers(gpt2, tmp_path: Path) -> None:
    folder, theirs = gpt2
    exported = tmp_path / "exported"
    exported.mkdir()
    save_decoder(exported, load_decoder(folder))
    again = GPT2LMHeadModel.from_pretrained(exported).eval()
    torch.testing.assert_close(again(ids()).logits, theirs(ids()).logits, atol=1e-5, rtol=1e-5)


def test_gpt2_small_has_its_124_439_808_weights() -> None:
    from app.models.decoder import Decoder, DecoderConfig

    with torch.device("meta"):
        model = Decoder(DecoderConfig(50257, 1024, num_layers=12, num_heads=12, width=768, mlp_width=3072))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_the_hash_follows_the_weights(gpt2, tmp_path: Path) -> None:
    folder, _ = gpt2
    before = weights_hash(folder)
    assert before == weights_hash(folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"] += 1
    save_file(weights, folder / "model.safetensors")
    assert weights_hash(folder) != before


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: (f / "config.json").unlink(), "lacks config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"rubbish"), "damaged"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (drop_tensor, "h.1.mlp.c_fc.weight"),
        (lambda f: edit_config(f, n_embd=52), "has shape"),
        (lambda f: edit_config(f, model_type="llama"), "'llama'"),
        (lambda f: edit_config(f, activation_function="relu"), "activation_function='relu'"),
        (lambda f: edit_config(f, n_layer=None), "lacks n_layer"),
    ],
)
def test_a_damaged_folder_is_told(gpt2, damage, part: str) -> None:
    folder, _ = gpt2
    damage(folder)
    with pytest.raises(UserError, match=part):
        load_decoder(folder)


def test_a_shard_that_is_missing_is_named(gpt2, tmp_path: Path) -> None:
    _, theirs = gpt2
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    first = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(UserError, match=first.name):
        load_decoder(tmp_path / "sharded")


def test_copies_of_a_folder_have_one_hash(gpt2, tmp_path: Path) -> None:
    folder, _ = gpt2
    shutil.copytree(folder, tmp_path / "copy")
    assert weights_hash(tmp_path / "copy") == weights_hash(folder)
