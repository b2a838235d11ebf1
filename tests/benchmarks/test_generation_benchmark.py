"""The generation benchmark's parts on a tiny model."""

import json
from pathlib import Path

import pytest

from app.engine.engine import Engine
from app.models.checkpoints import load_decoder
from benchmarks import kv_cache
from benchmarks.generation.contender import pacos, transformers
from benchmarks.generation.int8_checkpoint import int8_of
from benchmarks.generation.llamacpp import gguf_name
from benchmarks.generation.report import plot, summarize, table
from benchmarks.generation.workloads import read_requests, workload, write_requests

REQUESTS = [([5, 6, 7, 8], 6), ([9], 3), ([10, 11, 12], 9)]


def test_workloads_are_what_the_peers_were_measured_on(tmp_path: Path) -> None:
    (one,) = workload("W1")
    assert (len(one.ids), one.new_tokens) == (64, 128)
    many = workload("W2")
    assert len(many) == 64 and len(workload("W3")) == 500 and len(workload("W3", scale=0.1)) == 50
    assert all(16 <= len(request.ids) <= 128 and 16 <= request.new_tokens <= 128 for request in many)
    write_requests(many, tmp_path / "requests.json")
    assert read_requests(tmp_path / "requests.json") == many == workload("W2")


def test_contenders_generate_what_was_asked_for_and_agree_in_fp32(tiny_model: Path) -> None:
    answers = pacos(str(tiny_model), "fp32")(REQUESTS)
    assert [len(answer) for answer in answers] == [6, 3, 9]
    assert answers == pacos(str(tiny_model), "fp32", kernels="torch")(REQUESTS)
    assert answers == transformers(str(tiny_model), "fp32", batch_size=2)(REQUESTS)
    for precision, num_loras in (("fp32", 2), ("int8", 0), ("nf4", 0)):
        others = pacos(str(tiny_model), precision, num_loras=num_loras)
        assert [len(answer) for answer in others(REQUESTS)] == [6, 3, 9]


def test_every_tensor_of_gpt2_has_a_name_in_gguf() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
    names = {gguf_name(name) for name, _ in model.named_parameters()}
    layers = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    paths = ["output_norm", *(f"blk.{block}.{layer}" for block in range(2) for layer in layers)]
    both = {f"{path}.{kind}" for path in paths for kind in ("weight", "bias")}
    assert names == {"token_embd.weight", "position_embd.weight"} | both


def test_vllm_is_given_each_linear_layer_in_int8_and_the_rest_as_it_is(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    (tmp_path / "model").mkdir()
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16)).save_pretrained(tmp_path / "model")
    folder = int8_of(tmp_path / "model")
    assert folder == int8_of(tmp_path / "model") and not list(tmp_path.glob("*.unfinished"))
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"
    before, after = (load_file(each / "model.safetensors") for each in (tmp_path / "model", folder))
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    linear = {f"transformer.h.{block}.{layer}.weight" for block in range(2) for layer in layers}
    assert set(after) == set(before) | {f"{name}_scale" for name in linear}
    for name, weights in before.items():
        if name in linear:
            step = after[f"{name}_scale"]  # [out, 1]
            assert after[name].dtype == torch.int8 and step.shape == (weights.shape[1], 1)
            assert ((after[name] * step.T - weights).abs() <= step.T * 0.501).all()
        else:
            assert torch.equal(after[name], weights)


def test_both_ways_of_the_caches_benchmark_answer_alike_and_compute_the_rows_they_say(tiny_model: Path) -> None:
    model = load_decoder(tiny_model).requires_grad_(False)
    prompts = [[9 + 3 * place for place in range(20)], [7 * place for place in range(20)]]
    step_s, answers = kv_cache.compare(*kv_cache.engines(model, "fp32", max_batch_size=2), prompts, new=6)
    assert [len(seconds) for seconds in step_s.values()] == [6, 6]
    assert (
        answers["with cache"] == answers["without cache"] == pacos(str(tiny_model), "fp32")([(p, 6) for p in prompts])
    )
    with_cache, _ = kv_cache.engines(model, "fp32", max_batch_size=2)
    with pytest.raises(AssertionError, match="a step computed 10 rows, not 42"):  # 16 of a prompt are found again
        kv_cache.compare(with_cache, Engine(model, max_batch_size=2), prompts, new=6)


def test_bars_compare_runs_of_the_same_turn_and_failures_count_for_nothing(tmp_path: Path) -> None:
    def run(seconds: float, first: int = 1) -> dict:
        return {"tokens": 100, "seconds": seconds, "first_tokens": [first, 2]}

    report = {
        "machine": {"processor": "a", "cores": 2},
        "runs": {
            "W2": {
                "pacos_int8": [run(2.0), run(1.0)],
                "ctranslate2_int8": [run(5.0), run(6.0)],
                "pacos_fp32": [run(4.0)],
                "transformers_fp32": [run(8.0, first=3)],
                "vllm_bf16": [{"failed": "no"}],
            }
        },
    }
    result = summarize(report)
    assert result["tokens_per_s"]["W2"]["pacos_int8"] == 75.0 and "vllm_bf16" not in result["tokens_per_s"]["W2"]
    measured = {(bar["ours"], bar["peer"]): (bar["measured"], bar["reached"]) for bar in result["bars"]}
    assert measured == {
        ("pacos_int8", "ctranslate2_int8"): (4.25, True),  # between 2.5 and 6
        ("pacos_int8", "transformers_fp32"): (4.0, False),  # of the first turn
    }
    assert result["fp32_first_tokens_agree"]["W2 transformers_fp32"] == pytest.approx(0.5)
    assert "NOT reached: W2: pacos_int8 is 4.0 times transformers_fp32 (10.0)" in table(result)
    plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
