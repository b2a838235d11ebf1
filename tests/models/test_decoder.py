import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.engine.engine import Engine
from app.engine.sampling import Sampling
from app.errors import UserError
from app.models.attention import RowAttention, Rows, choose_backend
from app.models.checkpoints import load_decoder, save_decoder
from app.models.decoder import GPT2_SIZES, Decoder, DecoderConfig

GPT2 = DecoderConfig(400, context_length=96, num_layers=2, num_heads=4, width=32, mlp_width=64)
ARCHITECTURES = {
    "gpt2": GPT2,
    "custom": replace(GPT2, norm="rms_norm", activation="swiglu"),  # learned positions
    "llama": replace(
        GPT2, norm="rms_norm", activation="swiglu", positions="rotary", num_kv_heads=2, bias=False, mlp_width=48
    ),
    "clamped": replace(GPT2, activation="clamped_relu", num_kv_heads=1),
}


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Decoder:
    return new_model(ARCHITECTURES[request.param])


def new_model(config: DecoderConfig) -> Decoder:
    """Random weights of a trained model's size, biases too, so that nothing hides in zeros."""
    model = Decoder(config)
    draw = torch.Generator().manual_seed(0)
    model.initialize(generator=draw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.requires_grad_(False).eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 400, shape, generator=torch.Generator().manual_seed(seed))


def test_padding_on_the_right_changes_no_real_position(model: Decoder) -> None:
    short = ids(1, 10)
    padded = torch.cat([short, torch.zeros(1, 7, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded)[:, :10], model(short), atol=1e-4, rtol=1e-4)


def test_a_token_does_not_see_those_after_it(model: Decoder) -> None:
    tokens = ids(1, 12)
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 400
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_packed_documents_have_the_logits_that_they_have_alone(model: Decoder) -> None:
    first, second = ids(1, 9, seed=2), ids(1, 14, seed=3)
    positions = torch.cat([torch.arange(9), torch.arange(14)]).unsqueeze(0)
    documents = torch.tensor([[0] * 9 + [1] * 14])
    packed = model.head(model(torch.cat([first, second], dim=1), positions=positions, documents=documents))
    torch.testing.assert_close(packed[:, :9], model.head(model(first)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed[:, 9:], model.head(model(second)), atol=1e-4, rtol=1e-4)
    without = model.head(model(torch.cat([first, second], dim=1), positions=positions))
    assert not torch.allclose(without[:, 9:], packed[:, 9:], atol=1e-2)


def test_decoding_with_a_cache_gives_the_tokens_of_full_passes(model: Decoder) -> None:
    prompts = [ids(1, length, seed=length)[0].tolist() for length in (3, 17, 8)]
    engine = Engine(model, max_batch_size=2, max_queue=5)
    answers: dict[int, list[int]] = {engine.add_request(prompt, Sampling(max_tokens=10)): [] for prompt in prompts}
    while engine.has_work:
        for event in engine.step():
            if event.token is not None:
                answers[event.request_id].append(event.token)
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        tokens = list(prompt)
        for _ in range(10):
            tokens.append(int(model.head(model(torch.tensor([tokens])))[0, -1].argmax()))
        assert answer == tokens[len(prompt) :]


def test_a_saved_model_loads_bit_for_bit(model: Decoder, tmp_path: Path) -> None:
    save_decoder(tmp_path, model)
    again = load_decoder(tmp_path)
    assert again.config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_head_and_embedding_are_one_weight(model: Decoder) -> None:
    assert [name for name, _ in model.named_parameters() if "head" in name] == []
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(model.head(hidden), hidden @ model.token_embedding.weight.T)


def test_the_llama_architecture_gives_transformers_logits() -> None:
    """RMSNorm, rotary positions, grouped KV heads and SwiGLU at once, against an independent implementation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = new_model(ARCHITECTURES["llama"])
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=96, rms_norm_eps=1e-5, tie_word_embeddings=True,
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    weights = {
        "model.embed_tokens.weight": ours.token_embedding.weight,
        "lm_head.weight": ours.token_embedding.weight,
        "model.norm.weight": ours.final_norm.weight,
    }
    for layer in range(2):
        block, there = ours.get_submodule(f"blocks.{layer}"), f"model.layers.{layer}"
        q, k, v = block.attn.qkv.weight.split([32, 16, 16])
        gate, up = block.mlp.up.weight.chunk(2)
        weights |= {
            f"{there}.self_attn.q_proj.weight": q,
            f"{there}.self_attn.k_proj.weight": k,
            f"{there}.self_attn.v_proj.weight": v,
            f"{there}.self_attn.o_proj.weight": block.attn.out.weight,
            f"{there}.mlp.gate_proj.weight": gate,
            f"{there}.mlp.up_proj.weight": up,
            f"{there}.mlp.down_proj.weight": block.mlp.down.weight,
            f"{there}.input_layernorm.weight": block.attn_norm.weight,
            f"{there}.post_attention_layernorm.weight": block.mlp_norm.weight,
        }
    theirs.load_state_dict(weights)
    tokens = ids(3, 40)
    torch.testing.assert_close(ours.head(ours(tokens)), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("distilgpt2", 81_912_576),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt2_in_all_sizes_has_its_weights(name: str, count: int) -> None:
    with torch.device("meta"):
        model = Decoder(GPT2_SIZES[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# --- attention kernels --------------------------------------------------------------------------


def cpu_rows(**changes: object) -> Rows:
    return replace(Rows(4, 2, 8, torch.device("cpu"), torch.float32, is_packed=True, has_prefix=True), **changes)


@pytest.mark.parametrize(
    ("backend", "is_packed", "prefix_length"),
    [
        *itertools.product(("auto", "flash", "math"), (False, True), (0, 3)),
        ("flex", True, 3),
    ],  # which is compiled for a while
)
def test_every_kernel_computes_the_formula(backend: str, is_packed: bool, prefix_length: int) -> None:
    draw = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, heads, 20, 8, generator=draw) for heads in (4, 2, 2))
    documents = torch.tensor([[0] * 7 + [1] * 13, [0] * 20]) if is_packed else None
    prefix = [tuple(torch.randn(2, 2, prefix_length, 8, generator=draw))] if prefix_length else None
    mixed = RowAttention(documents, prefix=prefix, backend=backend).attend(0, q, k, v)
    expected = torch.zeros_like(q)
    for row in range(2):
        for head in range(4):
            for query in range(20):
                keys = [
                    k[row, head // 2, key]
                    for key in range(query + 1)
                    if documents is None or documents[row, key] == documents[row, query]
                ]
                values = [
                    v[row, head // 2, key]
                    for key in range(query + 1)
                    if documents is None or documents[row, key] == documents[row, query]
                ]
                if prefix is not None:
                    keys = [*prefix[0][0][head // 2], *keys]
                    values = [*prefix[0][1][head // 2], *values]
                scores = torch.stack(keys) @ q[row, head, query] / 8**0.5
                expected[row, head, query] = scores.softmax(0) @ torch.stack(values)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


def test_auto_says_which_kernel_it_takes() -> None:
    assert choose_backend("auto", cpu_rows(has_prefix=False)) == "c"
    assert choose_backend("auto", cpu_rows()) == "flash"
    assert choose_backend("auto", cpu_rows(dtype=torch.float16)) != "c"
    assert choose_backend("math", cpu_rows(is_packed=False)) == "math"


@pytest.mark.parametrize("backend", ["memory_efficient", "flex"])
def test_a_kernel_that_cannot_train_here_is_refused_with_those_that_can(backend: str) -> None:
    with pytest.raises(UserError, match=f"attention='{backend}' cannot train on cpu in float32 .*: flash, math"):
        choose_backend(backend, cpu_rows())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["memory_efficient", "math", "flex"])
def test_packed_training_on_a_gpu_gives_the_gradients_of_the_math_kernel(backend: str) -> None:
    config = replace(GPT2, width=128, num_heads=2)  # heads of 64
    documents = torch.tensor([[0] * 30 + [1] * 66], device="cuda")

    def gradient(kernel: str) -> Tensor:
        model = new_model(config).cuda().requires_grad_(True)
        model.attention = kernel
        model.head(model(ids(1, 96).cuda(), documents=documents)).square().mean().backward()
        return model.get_parameter("blocks.0.attn.qkv.weight").grad

    torch.testing.assert_close(gradient(backend), gradient("math"), atol=1e-5, rtol=1e-3)
