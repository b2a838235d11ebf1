"""Side by side with the `peft` library: the same logits both ways, and the same losses in training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from app.config import LoraConfig, MethodConfig, PrefixConfig, PromptConfig
from app.config.transfer import ExportConfig, ImportConfig
from app.data.tokenization import copy_tokenizer, load_tokenizer
from app.errors import UserError
from app.methods import apply_method
from app.methods.delta import Delta, apply_delta, read_delta, write_delta
from app.methods.transfer import export, import_adapter
from app.models.checkpoints import load_decoder, weights_hash
from app.models.decoder import Decoder
from app.training.optimizer import trained_parameters

peft = pytest.importorskip("peft")

VOCABULARY = 400
ALL_LAYERS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]

METHODS: dict[str, tuple[MethodConfig, Any]] = {
    "lora": (
        LoraConfig(rank=4, alpha=8),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LAYERS, fan_in_fan_out=True),
    ),
    "rslora": (
        LoraConfig(rank=4, alpha=8, targets=("attn.qkv",), rank_stabilized=True),
        lambda: peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["attn.c_attn"], fan_in_fan_out=True, use_rslora=True
        ),
    ),
    "dora": (
        LoraConfig(rank=4, alpha=8, dora=True),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LAYERS, fan_in_fan_out=True, use_dora=True),
    ),
    "prefix": (
        PrefixConfig(length=6),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM"),
    ),
    "prefix with an MLP": (
        PrefixConfig(length=6, mlp_width=24),
        lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=6, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=24
        ),
    ),
    "prompt": (
        PromptConfig(length=6),
        lambda: peft.PromptTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM"),
    ),
}


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `transformers` GPT-2 with weights of a trained one's size, saved by it, and a tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    copy_tokenizer(tiny_model, folder)
    return folder


def batches() -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(1)
    while True:
        # few of the tokens, so that there is something to learn
        yield torch.randint(20, (4, 16), generator=draw)


def our_logits(model: Decoder, ids: Tensor) -> Tensor:
    return model.head(model(ids))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def with_peft(base: Path, config: Any) -> Any:
    return peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)


def their_logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


def train(model: Any, logits: Any, *, steps: int, learning_rate: float = 1e-2) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    losses = []
    for _, ids in zip(range(steps), batches(), strict=False):
        loss = loss_of(logits(model, ids), ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def start_alike(ours: Decoder, theirs: Any, folder: Path) -> None:
    """Give `ours` the adapter weights of `theirs`."""
    if getattr(theirs.peft_config["default"], "prefix_projection", False):
        encoder = theirs.prompt_encoder["default"]
        prefix: Any = ours.prefix
        prefix.embeddings.copy_(encoder.embedding.weight)
        prefix.hidden.load_state_dict(encoder.transform[0].state_dict())
        prefix.out.load_state_dict(encoder.transform[2].state_dict())
        return
    theirs.save_pretrained(folder / "start")
    start = import_adapter(ImportConfig(source=str(folder / "start"), model=theirs.base, output=str(folder / "ours")))
    for name, parameter in trained_parameters(ours).items():
        parameter.copy_(start.weights[name])


@pytest.mark.parametrize("name", METHODS)
def test_trained_from_the_same_start_the_losses_are_those_of_peft(name: str, base: Path, tmp_path: Path) -> None:
    ours_config, theirs_config = METHODS[name]
    torch.manual_seed(2)
    theirs = with_peft(base, theirs_config())
    theirs.base = str(base)
    ours = load_decoder(base)
    apply_method(ours, ours_config)
    start_alike(ours, theirs, tmp_path)
    ours.train()
    theirs.train()
    our_losses, their_losses = train(ours, our_logits, steps=50), train(theirs, their_logits, steps=50)
    assert our_losses[-1] < our_losses[0] - 0.05
    assert our_losses == pytest.approx(their_losses, abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_peft_loads_what_we_export_with_the_same_logits(name: str, base: Path, tmp_path: Path) -> None:
    from app.methods import without_training_parts

    config, _ = METHODS[name]
    model = load_decoder(base)
    apply_method(model, config)
    train(model, our_logits, steps=5)
    config = without_training_parts(model, config)
    weights = {key: parameter.detach().clone() for key, parameter in trained_parameters(model).items()}
    metadata = {
        "base": str(base),
        "base_hash": weights_hash(base),
        "tokenizer_hash": load_tokenizer(base).fingerprint(),
    }
    (tmp_path / "delta").mkdir()
    write_delta(tmp_path / "delta", Delta(config, weights, metadata))
    export(ExportConfig(delta=str(tmp_path / "delta"), output=str(tmp_path / "peft")))
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), tmp_path / "peft").eval()
    ids = next(batches())
    with torch.no_grad():
        torch.testing.assert_close(their_logits(theirs, ids), our_logits(model.eval(), ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_we_load_what_peft_trained_with_the_same_logits(name: str, base: Path, tmp_path: Path) -> None:
    theirs = with_peft(base, METHODS[name][1]())
    before = {key: value.clone() for key, value in theirs.named_parameters() if value.requires_grad}
    train(theirs, their_logits, steps=5)
    assert all(not torch.equal(before[key], theirs.get_parameter(key)) for key in before)
    theirs.eval().save_pretrained(tmp_path / "peft")
    output = str(tmp_path / "delta")
    import_adapter(ImportConfig(source=str(tmp_path / "peft"), model=str(base), output=output))
    ours = load_decoder(base)
    apply_delta(ours, read_delta(Path(output)))
    ids = next(batches())
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours, ids), their_logits(theirs, ids), atol=1e-4, rtol=1e-4)


def saved_lora(base: Path, folder: Path, **settings: Any) -> Path:
    config = peft.LoraConfig(r=4, target_modules=ALL_LAYERS, fan_in_fan_out=True, **settings)
    with_peft(base, config).save_pretrained(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "lacks adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"rubbish"), "damaged"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "damaged"),
        (lambda f: edit(f / "adapter_config.json", peft_type="IA3"), "'IA3'; can be read: LORA"),
        (lambda f: edit(f / "adapter_config.json", rank_pattern={"mlp.c_fc": 2}), "rank_pattern"),
        (lambda f: edit(f / "adapter_config.json", bias="all"), "bias='all'"),
        (lambda f: edit(f / "adapter_config.json", r=3), "does not fit"),
        (lambda f: edit(f / "adapter_config.json", r=0), "does not fit"),
        (lambda f: edit(f / "adapter_config.json", lora_alpha=None), "does not fit"),
        (lambda f: edit(f / "adapter_config.json", peft_type=[]), "can be read: LORA"),
    ],
)
def test_what_cannot_be_imported_is_told(base: Path, tmp_path: Path, damage: Any, part: str) -> None:
    folder = saved_lora(base, tmp_path / "peft")
    damage(folder)
    with pytest.raises(UserError, match=part):
        import_adapter(ImportConfig(source=str(folder), model=str(base), output=str(tmp_path / "delta")))
    assert not (tmp_path / "delta").exists()


def test_a_lora_over_other_layers_is_told(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["lm_head"])
    with_peft(base, config).save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match="does not fit model=.*lm_head"):
        import_adapter(ImportConfig(source=str(tmp_path / "peft"), model=str(base), output=str(tmp_path / "delta")))
