"""llama.cpp as a contender: GPT-2's weights as GGUF, quantized by llama.cpp itself, and generation through its C API.

Runs in llama.cpp's own environment, so it imports nothing of Pacos.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Batch = list[tuple[list[int], int]]

CONTEXT = 256
"""Tokens of a sequence: the workloads' longest prompt and answer."""
_FTYPES = {"q8": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4": "LLAMA_FTYPE_MOSTLY_Q4_0"}
_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
_NAMES_IN_BLOCK = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def gguf_of(model: Path, precision: str) -> Path:
    """The file beside `model` that has its weights in f16, q8 (Q8_0) or q4 (Q4_0, the tied head in Q6_K, as llama.cpp
    chooses); made if need be."""
    import llama_cpp

    file = model.parent / f"llamacpp-{precision}.gguf"
    if file.exists():
        return file
    unfinished = file.with_suffix(".unfinished")
    if precision == "f16":
        write_gguf(model, unfinished)
    else:
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, _FTYPES[precision])
        parameters.nthread = os.cpu_count() or 1
        source = gguf_of(model, "f16")
        failure = llama_cpp.llama_model_quantize(str(source).encode(), str(unfinished).encode(), parameters)
        if failure:
            raise RuntimeError(f"llama.cpp cannot quantize {source} to {precision}: it returned {failure}")
    unfinished.replace(file)
    return file


def write_gguf(model: Path, file: Path) -> None:
    """GPT-2's folder as `transformers` writes it to a GGUF file of f16 matrices, without a tokenizer."""
    import json

    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    for name, weights in load_file(model / "model.safetensors").items():
        if name == "lm_head.weight":  # tied
            continue
        if ".c_" in name and weights.ndim == 2:  # Conv1D: [in, out]
            weights = weights.T
        halved = weights.ndim == 2 and not name.endswith("wpe.weight")
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(weights, dtype=np.float16 if halved else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """GGUF's name of what `transformers` calls `name`: transformer.h.3.mlp.c_fc.bias is blk.3.ffn_up.bias."""
    path, _, kind = name.removeprefix("transformer.").rpartition(".")
    if not path.startswith("h."):
        return f"{_NAMES[path]}.{kind}"
    _, block, layer = path.split(".", 2)
    return f"blk.{block}.{_NAMES_IN_BLOCK[layer]}.{kind}"


def batches(file: Path, *, batch_size: int) -> Callable[[Batch], list[list[int]]]:
    """Greedy answers to up to `batch_size` requests at once, those with the longest answers first: a sequence whose
    answer is done leaves the batch, and the rest stay neighbours, as llama.cpp wants those of one pass to be."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = batch_size * CONTEXT
    settings.n_seq_max = batch_size
    settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
    context = llama_cpp.llama_init_from_model(loaded, settings)
    if not context:
        raise RuntimeError(f"llama.cpp cannot load {file}")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    rows: Any = llama_cpp.llama_batch_init(batch_size * CONTEXT, 0, 1)

    def step(fed: list[tuple[int, list[int], int]]) -> list[int]:
        """The next token of each sequence, which goes on with these ids at this position."""
        last = []
        rows.n_tokens = 0
        for sequence, ids, position in fed:
            for offset, token in enumerate(ids):
                row = rows.n_tokens
                rows.token[row], rows.pos[row] = token, position + offset
                rows.n_seq_id[row], rows.seq_id[row][0] = 1, sequence
                rows.logits[row] = offset == len(ids) - 1
                rows.n_tokens += 1
            last.append(rows.n_tokens - 1)
        if failure := llama_cpp.llama_decode(context, rows):
            raise RuntimeError(f"llama.cpp cannot decode a batch of {rows.n_tokens} tokens: it returned {failure}")
        logits = (llama_cpp.llama_get_logits_ith(context, row) for row in last)
        return [int(np.ctypeslib.as_array(each, (vocab_size,)).argmax()) for each in logits]

    def generate(requests: Batch) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        answers: list[list[int]] = [[] for _ in requests]
        fed = [(number, ids, 0) for number, (ids, _) in enumerate(requests)]
        while fed:
            for (number, _, _), token in zip(fed, step(fed), strict=True):
                answers[number].append(token)
            fed = [
                (number, [answers[number][-1]], len(ids) + len(answers[number]) - 1)
                for number, (ids, count) in enumerate(requests)
                if len(answers[number]) < count
            ]
        return answers

    return generate
