"""What every technique must hold, alone and composed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from app.assets import model_folder
from app.config import (
    AdapterConfig,
    BitFitConfig,
    ComposedConfig,
    Config,
    ExtraBlockConfig,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
    TrainConfig,
    load_config,
)
from app.data.batches import Batch, collate
from app.engine.engine import Engine
from app.engine.sampling import Sampling
from app.errors import UserError
from app.methods import apply_method, merge_method, without_training_parts
from app.methods.delta import Delta, apply_delta, fold_delta, read_delta, write_delta
from app.methods.description import describe
from app.models.checkpoints import load_decoder
from app.models.decoder import GPT2_SIZES, Decoder, DecoderConfig
from app.training.loss import masked_nll
from app.training.optimizer import trained_parameters


@dataclass(frozen=True)
class Case:
    method: MethodConfig
    trains: tuple[str, ...]
    """Ends of the names of what trains."""
    is_identity_at_first: bool = True
    is_mergeable: bool = True


BLOCK = (
    "attn_norm.weight",
    "attn_norm.bias",
    "attn.qkv.weight",
    "attn.qkv.bias",
    "attn.out.weight",
    "attn.out.bias",
    "mlp_norm.weight",
    "mlp_norm.bias",
    "mlp.up.weight",
    "mlp.up.bias",
    "mlp.down.weight",
    "mlp.down.bias",
)
LORA, ADAPTER = (
    ("lora_a", "lora_b"),
    ("adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias"),
)
CASES = {
    "lora": Case(LoraConfig(rank=4), LORA),
    "rslora": Case(LoraConfig(rank=4, targets=("attn.qkv", "mlp.down"), rank_stabilized=True), LORA),
    "dora": Case(LoraConfig(rank=4, dora=True), (*LORA, "magnitude")),
    "adapter": Case(AdapterConfig(size=8), ADAPTER, is_mergeable=False),
    "adapter behind the MLP": Case(AdapterConfig(size=8, placement="mlp"), ADAPTER, is_mergeable=False),
    "prefix": Case(
        PrefixConfig(length=5), ("prefix.keys", "prefix.values"), is_identity_at_first=False, is_mergeable=False
    ),
    "prefix with an MLP": Case(
        PrefixConfig(length=5, mlp_width=16),
        ("prefix.embeddings", "hidden.weight", "hidden.bias", "prefix.out.weight", "prefix.out.bias"),
        is_identity_at_first=False,
        is_mergeable=False,
    ),
    "prompt": Case(PromptConfig(length=5), ("prefix.embeddings",), is_identity_at_first=False, is_mergeable=False),
    "freeze": Case(
        FreezeConfig(frozen=("embeddings", "blocks.0")),
        (*(f"blocks.1.{name}" for name in BLOCK), "final_norm.weight", "final_norm.bias"),
    ),
    "freeze parts of a block": Case(
        FreezeConfig(frozen=("embeddings", "blocks.0-1", "final_norm.bias")), ("final_norm.weight",)
    ),
    "extra block": Case(ExtraBlockConfig(), tuple(f"blocks.2.{name}" for name in BLOCK)),
    "extra blocks": Case(ExtraBlockConfig(count=2), tuple(f"blocks.{n}.{name}" for n in (1, 3) for name in BLOCK)),
    "bitfit": Case(BitFitConfig(), ("bias",)),
    "full": Case(FullConfig(), ("weight", "bias")),
    "extra block and lora": Case(
        ComposedConfig(parts=(ExtraBlockConfig(), LoraConfig(rank=4))),
        (*LORA, *(f"blocks.2.{name}" for name in BLOCK)),
    ),
    "lora, bitfit and adapter": Case(
        ComposedConfig(parts=(AdapterConfig(size=8), BitFitConfig(), LoraConfig(rank=4))),
        (*LORA, "bias", "adapter_down.weight", "adapter_up.weight"),
        is_mergeable=False,
    ),
    "freeze and lora": Case(
        ComposedConfig(parts=(FreezeConfig(frozen=("blocks.0-1", "embeddings")), LoraConfig(rank=4))),
        (*LORA, "final_norm.weight", "final_norm.bias"),
    ),
    "lora and prompt": Case(
        ComposedConfig(parts=(LoraConfig(rank=4), PromptConfig(length=5))),
        (*LORA, "prefix.embeddings"),
        is_identity_at_first=False,
        is_mergeable=False,
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def new_model(tiny_model: Path, method: MethodConfig) -> Decoder:
    model = load_decoder(tiny_model)
    torch.manual_seed(0)
    apply_method(model, method)
    return model.train()


def train(model: Decoder, batches: list[Batch], *, learning_rate: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=learning_rate, weight_decay=0.0)
    for batch in batches:
        nll, count = masked_nll(model, batch)
        (nll / count).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: Decoder, batches: list[Batch]) -> float:
    sums = [masked_nll(model.eval(), batch) for batch in batches]
    return sum(nll.item() for nll, _ in sums) / sum(count.item() for _, count in sums)


@torch.no_grad()
def logits(model: Decoder, ids: Tensor) -> Tensor:
    return model.head(model.eval()(ids))


def test_only_its_weights_train_and_all_of_them_move(case: Case, tiny_model: Path, batches: list[Batch]) -> None:
    model = new_model(tiny_model, case.method)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, batches[:3])
    masked_nll(model, batches[3])[0].backward()
    for name, parameter in model.named_parameters():
        trains = name.endswith(case.trains)
        assert parameter.requires_grad == trains, name
        assert (parameter.grad is not None) == trains, name
        assert torch.equal(parameter, before[name]) != trains, name


def test_step_zero_equals_the_base_where_the_paper_says_so(case: Case, tiny_model: Path, batches: list[Batch]) -> None:
    ids = batches[0].input_ids
    base, tuned = logits(load_decoder(tiny_model), ids), logits(new_model(tiny_model, case.method), ids)
    if case.is_identity_at_first:
        torch.testing.assert_close(tuned, base, atol=1e-6, rtol=1e-6)
    else:
        assert not torch.allclose(tuned, base, atol=1e-3)


def test_twenty_steps_on_real_records_lower_the_loss(case: Case, embedded_batches: list[Batch]) -> None:
    model = new_model(model_folder("embedded"), case.method)
    before = loss(model, embedded_batches[:5])
    train(model.train(), embedded_batches, learning_rate=3e-4 if case.is_identity_at_first else 3e-3)
    assert loss(model, embedded_batches[:5]) < before - 0.05


def test_a_saved_delta_restores_the_model_bit_for_bit(
    case: Case, tiny_model: Path, tmp_path: Path, batches: list[Batch]
) -> None:
    model = new_model(tiny_model, case.method)
    train(model, batches[:3])
    method = without_training_parts(model, case.method)
    delta = Delta(method, {name: p.detach() for name, p in trained_parameters(model).items()}, {})
    write_delta(tmp_path, delta)
    again = read_delta(tmp_path)
    assert again.method == method
    assert again.hash == delta.hash
    restored = load_decoder(tiny_model)
    apply_delta(restored, again)
    ids = batches[0].input_ids
    assert torch.equal(logits(restored, ids), logits(model, ids))


def test_the_merged_model_is_plain_and_agrees_after_training(
    case: Case, tiny_model: Path, batches: list[Batch]
) -> None:
    model = new_model(tiny_model, case.method)
    train(model, batches)
    ids = batches[0].input_ids
    before = logits(model, ids)
    if not case.is_mergeable:
        with pytest.raises(UserError, match="cannot be merged: .*serve the delta"):
            merge_method(model, case.method)
        return
    merge_method(model, case.method)
    plain = Decoder(model.config)
    assert plain.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits(model, ids), before, atol=1e-4, rtol=1e-4)


def test_packed_documents_have_the_loss_that_they_have_alone(
    case: Case, tiny_model: Path, records: list[tuple[np.ndarray, np.ndarray]], batches: list[Batch]
) -> None:
    model = new_model(tiny_model, case.method)
    train(model, batches[:3])
    documents = [(ids[-25:], mask[-25:]) for ids, mask in records[:3]]
    ids, mask = (np.concatenate(columns) for columns in zip(*documents, strict=True))
    packed = collate([ids], [mask], [np.array([len(ids) for ids, _ in documents])])
    apart = [collate([ids], [mask]) for ids, mask in documents]
    # the first token of a document is predicted by nothing where it stands alone
    packed.loss_mask[:, [0, *np.cumsum([len(ids) for ids, _ in documents])[:-1]]] = False
    for batch in apart:
        batch.loss_mask[:, 0] = False
    with torch.no_grad():
        expected = sum(masked_nll(model.eval(), batch)[0].item() for batch in apart)
        assert masked_nll(model, packed)[0].item() == pytest.approx(expected, rel=1e-4)


def test_the_engine_generates_what_the_model_alone_would(case: Case, tiny_model: Path, batches: list[Batch]) -> None:
    model = new_model(tiny_model, case.method)
    train(model, batches[:5])
    model.requires_grad_(False).eval()
    prompts = [batches[0].input_ids[row, : 8 + 3 * row].tolist() for row in range(4)]
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    weights = {name: p.detach().clone() for name, p in new_model(tiny_model, case.method).named_parameters()}
    trained = {name: p.detach() for name, p in model.named_parameters() if name.endswith(case.trains)}
    assert trained.keys() <= weights.keys()
    served = load_decoder(tiny_model)
    fold_delta(served, Delta(case.method, trained, {}))
    engine = Engine(served.requires_grad_(False), max_batch_size=3, max_queue=9)
    ids = [engine.add_request(prompt, Sampling(max_tokens=12)) for prompt in prompts]
    answers: dict[int, list[int]] = {request_id: [] for request_id in ids}
    while engine.has_work:
        for event in engine.step():
            if event.token is not None:
                answers[event.request_id].append(event.token)
    assert [answers[request_id] for request_id in ids] == expected


@torch.no_grad()
def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.head(model(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (LoraConfig(rank=8, targets=("attn.qkv",)), 294_912),
        (LoraConfig(rank=4, targets=("attn.qkv", "attn.out", "mlp.up", "mlp.down")), 589_824),
        (LoraConfig(rank=4, targets=("attn.qkv",), dora=True), 147_456 + 12 * 2304),
        (AdapterConfig(size=64), 2_379_264),
        (AdapterConfig(size=64, placement="mlp"), 1_189_632),
        (PrefixConfig(length=50), 921_600),
        (PromptConfig(length=50), 38_400),
        (ExtraBlockConfig(), 7_087_872),
        (ExtraBlockConfig(count=3), 3 * 7_087_872),
        (FullConfig(), 124_439_808),
        (ComposedConfig(parts=(ExtraBlockConfig(), LoraConfig(rank=8, targets=("attn.qkv",)))), 7_087_872 + 294_912),
        *(
            (FreezeConfig(frozen=("embeddings", f"blocks.0-{k - 1}")), (12 - k) * 7_087_872 + 1_536)
            for k in (1, 6, 10, 12)
        ),
    ],
)
def test_gpt2_small_gets_exactly_the_expected_number_of_trained_weights(method: MethodConfig, count: int) -> None:
    with torch.device("meta"):
        model = Decoder(GPT2_SIZES["gpt2"])
        apply_method(model, method)
    assert sum(parameter.numel() for parameter in trained_parameters(model).values()) == count
    assert describe(model).trained == count


def test_gpt2_small_has_its_124_439_808_weights_and_their_memory_is_told() -> None:
    with torch.device("meta"):
        model = Decoder(GPT2_SIZES["gpt2"])
        apply_method(model, LoraConfig(rank=8, targets=("attn.qkv",)))
    description = describe(model)
    assert description.parameters == 124_439_808 + 294_912
    rows = {row.full_name: row for row in description.rows}
    assert rows["blocks.0-11.attn.qkv"].shapes == [(8, 768), (2304, 8)]
    assert rows["blocks.0-11.attn.qkv"].optimizer_bytes == 8 * 294_912
    assert rows["blocks.0-11.attn.qkv.base"].gradient_bytes == 0
    assert sum(row.weight_bytes for row in description.rows) == 4 * description.parameters


@pytest.mark.parametrize(
    ("method", "part"),
    [
        (LoraConfig(targets=("q_proj",)), "'q_proj' matches no layer.*attn.out, attn.qkv, mlp.down, mlp.up"),
        (LoraConfig(rank=32), "method.rank=32 must be below 32"),
        (AdapterConfig(size=32), "method.size=32 must be below 32"),
        (PrefixConfig(length=95), "method.length=95 leaves no room .* context of 96"),
        (PromptConfig(length=95), "method.length=95 leaves no room .* context of 96"),
        (FreezeConfig(frozen=("blocks.0-7",)), "'blocks.0-7' matches nothing; the model has: .*blocks.0-1.*attn.qkv"),
        (FreezeConfig(frozen=("token_embeding",)), "'token_embeding' matches nothing"),
        (FreezeConfig(frozen=("embeddings", "blocks.0-1", "final_norm")), "freezes every weight"),
        (
            ComposedConfig(parts=(FreezeConfig(frozen=("embeddings",)), LoraConfig(rank=4))),
            "'lora' finds nothing to update",
        ),
        (
            ComposedConfig(parts=(FreezeConfig(frozen=("embeddings",)), AdapterConfig(size=4))),
            "'adapter' finds no block",
        ),
    ],
)
def test_a_technique_that_does_not_fit_the_model_says_why(tiny_model: Path, method: MethodConfig, part: str) -> None:
    with pytest.raises(UserError, match=part):
        apply_method(load_decoder(tiny_model), method)


def method_of(*overrides: str) -> Config:
    return load_config(TrainConfig, overrides=["data=d", "output=o", *overrides]).method


def test_a_list_composes() -> None:
    composed = method_of("method=[{type: extra_block}, {type: lora, rank: 4}]")
    assert composed == ComposedConfig(parts=(ExtraBlockConfig(), LoraConfig(rank=4)))
    assert method_of("method=[{type: bitfit}]") == BitFitConfig()


@pytest.mark.parametrize(
    ("listed", "part"),
    [
        ("[{type: full}, {type: lora}]", "full trains every weight already"),
        ("[{type: lora}, {type: lora, rank: 2}]", "lora stands there twice"),
        ("[{type: prefix}, {type: prompt}]", "prefix and prompt both claim the place"),
        ("[{type: freeze, frozen: [head]}, {type: bitfit}]", "freeze and bitfit both choose"),
        ("[]", "the list is empty"),
        ("[{type: lora, rnk: 2}, {type: prompt}]", "method.parts.0.rnk=2: unknown key; did you mean 'rank'"),
        ("[{type: lara}, {type: prompt}]", "method.parts.0.type='lara': unknown; one of 'lora'"),
    ],
)
def test_compositions_that_make_no_sense_are_refused_with_the_reason(listed: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        method_of(f"method={listed}")


@pytest.mark.parametrize(
    "method",
    [LoraConfig(rank=4), AdapterConfig(size=4), PrefixConfig(length=5), PromptConfig(length=5), ExtraBlockConfig()],
    ids=lambda method: method.type,
)
def test_other_architectures_take_them_too(method: MethodConfig) -> None:
    """RMSNorm, rotary positions, grouped KV heads and SwiGLU: packed, and in the engine."""
    torch.manual_seed(0)
    config = DecoderConfig(
        400, context_length=96, num_layers=2, num_heads=4, width=32, mlp_width=48, norm="rms_norm",
        positions="rotary", activation="swiglu", num_kv_heads=2, bias=False,
    )  # fmt: skip
    model = Decoder(config)
    model.initialize()
    apply_method(model, method)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.requires_grad_(False).eval()
    ids = torch.randint(400, (1, 20))
    documents = torch.tensor([[0] * 8 + [1] * 12])
    positions = torch.cat([torch.arange(8), torch.arange(12)]).unsqueeze(0)
    packed = model(ids, positions=positions, documents=documents)
    torch.testing.assert_close(packed[:, 8:], model(ids[:, 8:]), atol=1e-4, rtol=1e-4)
    engine = Engine(model, max_batch_size=1, max_queue=1)
    engine.add_request(ids[0].tolist(), Sampling(max_tokens=8))
    answer = [event.token for _ in range(8) for event in engine.step()]
    assert answer == greedy(model, ids[0].tolist(), 8)
