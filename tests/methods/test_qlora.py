"""LoRA over a quantized base (QLoRA), and what does not go with one."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from app.config import (
    AdapterConfig,
    BitFitConfig,
    ExtraBlockConfig,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
)
from app.config.transfer import DescribeConfig, ExportConfig, MergeConfig
from app.data.batches import Batch
from app.data.tokenization import copy_tokenizer, load_tokenizer
from app.errors import UserError
from app.methods import apply_method
from app.methods.delta import Delta, apply_delta, fold_delta, read_delta, write_delta
from app.methods.description import describe, describe_model
from app.methods.transfer import export, merge
from app.models.checkpoints import empty_decoder, load_decoder, save_decoder, weights_hash
from app.models.decoder import Decoder
from app.models.quantization import QuantizationConfig, Scheme, quantize, quantized_bytes
from app.training.loss import masked_nll
from app.training.optimizer import trained_parameters


@pytest.fixture(scope="module")
def quantized(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` in 4 bits, as `pacos quantize` writes it."""
    return quantized_folder(tiny_model, tmp_path_factory.mktemp("nf4"), "nf4")


def quantized_folder(source: Path, folder: Path, scheme: Scheme) -> Path:
    config = QuantizationConfig(scheme=scheme)
    model = load_decoder(source)
    quantize(model, config)
    save_decoder(folder, model, quantization=config)
    copy_tokenizer(source, folder)
    return folder


def train(model: Decoder, batches: list[Batch]) -> list[float]:
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-2)
    losses = []
    for batch in batches:
        nll, count = masked_nll(model, batch)
        (nll / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((nll / count).item())
    return losses


def write_trained(folder: Path, model: Decoder, method: MethodConfig, base: Path) -> None:
    weights = {name: parameter.detach() for name, parameter in trained_parameters(model).items()}
    metadata = {
        "base": str(base),
        "base_hash": weights_hash(base),
        "tokenizer_hash": load_tokenizer(base).fingerprint(),
    }
    folder.mkdir()
    write_delta(folder, Delta(method, weights, metadata))


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight", "nf4"])
def test_a_quantized_folder_loads_bit_for_bit(scheme: Scheme, tiny_model: Path, tmp_path: Path) -> None:
    model = load_decoder(tiny_model)
    quantize(model, QuantizationConfig(scheme=scheme))
    again = load_decoder(quantized_folder(tiny_model, tmp_path, scheme))
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    ids = torch.randint(400, (2, 30), generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize(
    "method",
    [LoraConfig(rank=4), LoraConfig(rank=4, dora=True), ExtraBlockConfig()],
    ids=["lora", "dora", "extra_block"],
)
def test_qlora_trains_and_merges_into_a_plain_model(
    method: MethodConfig, quantized: Path, tmp_path: Path, batches: list[Batch]
) -> None:
    model = load_decoder(quantized)
    codes = model.get_buffer("blocks.0.mlp.up.codes").clone()
    apply_method(model, method)
    losses = train(model, batches)
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.1
    name = "blocks.0.mlp.up.base.codes" if isinstance(method, LoraConfig) else "blocks.0.mlp.up.codes"
    assert torch.equal(model.get_buffer(name), codes)
    write_trained(tmp_path / "delta", model, method, quantized)
    merged = merge(MergeConfig(delta=str(tmp_path / "delta"), output=str(tmp_path / "merged")))
    assert merged.largest_difference < 1e-4
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    ids = batches[0].input_ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.head(model.eval()(ids)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [AdapterConfig(size=4), PrefixConfig(length=3)], ids=lambda method: method.type)
def test_what_adds_to_a_quantized_model_trains_and_loads(
    method: MethodConfig, quantized: Path, tmp_path: Path, batches: list[Batch]
) -> None:
    model = load_decoder(quantized)
    apply_method(model, method)
    train(model, batches[:3])
    write_trained(tmp_path / "delta", model, method, quantized)
    again = load_decoder(quantized)
    apply_delta(again, read_delta(tmp_path / "delta"))
    ids = batches[0].input_ids
    assert torch.equal(again.eval()(ids), model.eval()(ids))


@pytest.mark.parametrize(
    "method", [FullConfig(), BitFitConfig(), FreezeConfig(frozen=("embeddings",))], ids=lambda method: method.type
)
def test_rounded_weights_do_not_train(method: MethodConfig, quantized: Path) -> None:
    with pytest.raises(UserError, match=f"'{method.type}' trains the model's own weights, which are quantized"):
        apply_method(load_decoder(quantized), method)


def test_a_delta_over_4_bits_is_not_taken_for_one_over_full_precision(
    quantized: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = load_decoder(quantized)
    apply_method(model, LoraConfig(rank=4))
    write_trained(tmp_path / "delta", model, LoraConfig(rank=4), quantized)
    with pytest.raises(UserError, match="does not belong to the model"):
        merge(MergeConfig(delta=str(tmp_path / "delta"), output=str(tmp_path / "m"), model=str(tiny_model)))
    with pytest.raises(UserError, match="in our own format; peft wraps models that transformers opens"):
        export(ExportConfig(delta=str(tmp_path / "delta"), output=str(tmp_path / "peft")))


def test_a_quantized_model_is_described_by_its_weights_and_their_bytes(quantized: Path, tiny_model: Path) -> None:
    model = empty_decoder(quantized)
    apply_method(model, LoraConfig(rank=4, targets=("attn.qkv",)))
    described, plain = describe(model), describe(load_decoder(tiny_model))
    assert described.parameters == plain.parameters + described.trained
    rows = {row.full_name: row for row in described.rows}
    assert rows["blocks.0-1.attn.qkv.base"].shapes == [(96, 32), (96,)]
    assert rows["blocks.0-1.attn.qkv.base"].weight_bytes < 0.2 * 4 * 2 * 96 * 33


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight", "nf4"])
@pytest.mark.parametrize(
    "method",
    [
        LoraConfig(rank=4, dora=True),
        AdapterConfig(size=4),
        PrefixConfig(length=3),
        PromptConfig(length=3),
        ExtraBlockConfig(),
    ],
    ids=lambda method: method.type,
)
def test_what_will_train_is_known_without_memory(
    scheme: Scheme, method: MethodConfig, tiny_model: Path, tmp_path: Path
) -> None:
    folder = quantized_folder(tiny_model, tmp_path, scheme)
    model = load_decoder(folder)
    apply_method(model, method)
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    assert describe_model(DescribeConfig(model=str(folder), method=method)).trained == trained


def test_a_served_model_stays_quantized(quantized: Path, tmp_path: Path, batches: list[Batch]) -> None:
    model = load_decoder(quantized)
    apply_method(model, LoraConfig(rank=4))
    train(model, batches[:3])
    write_trained(tmp_path / "delta", model, LoraConfig(rank=4), quantized)
    served = load_decoder(quantized)
    fold_delta(served, read_delta(tmp_path / "delta"))
    assert quantized_bytes(served) == quantized_bytes(load_decoder(quantized))
    ids = batches[0].input_ids
    assert torch.equal(served.eval()(ids), model.eval()(ids))


def test_a_damaged_quantization_entry_is_told(quantized: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = shutil.copytree(quantized, tmp_path / "copy")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization": {"scheme": "int3"}}))
    with pytest.raises(UserError, match="quantization.scheme: Input should be 'int8_dynamic'"):
        load_decoder(folder)
