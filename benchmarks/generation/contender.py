"""One contender in a process of its own: `python contender.py NAME --model FOLDER --requests FILE`.

Prints one line of JSON: tokens, seconds, and a digest of the tokens. Peers' processes run in environments that have no
Pacos, so this file imports from it only within Pacos's own contenders. Each warms up with a few requests first.
"""

import argparse
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Requests = list[tuple[list[int], int]]
"""Prompt ids and how many new tokens."""
Answers = list[list[int]]
Generate = Callable[[Requests], Answers]

SCHEMES = {"fp32": None, "bf16": None, "int8": "int8_dynamic", "nf4": "nf4"}
"""What Pacos's linear layers are quantized to, with head, keys and values in int8."""


def pacos(
    model: str, precision: str, *, kernels: str = "auto", num_loras: int = 0, max_batch_size: int = 128
) -> Generate:
    import torch

    from app.engine.engine import Engine, EngineSettings
    from app.engine.sampling import Sampling
    from app.models.checkpoints import load_decoder
    from app.models.quantization import QuantizationConfig, quantize

    torch.set_num_threads(os.cpu_count() or 1)
    decoder = load_decoder(Path(model)).requires_grad_(False)
    if scheme := SCHEMES[precision]:
        quantize(decoder, QuantizationConfig.model_validate({"scheme": scheme}))
    if precision == "bf16":
        decoder = decoder.bfloat16()
    settings = EngineSettings(
        max_batch_size=128,
        max_queue=1000,
        int8_head=scheme is not None,
        max_kv_bytes=5 << 29,
        prefault_kv=True,  # as vLLM does
        kv_dtype="int8" if scheme else "auto",
        kernels=kernels,  # type: ignore[arg-type]
    )
    engine = Engine(decoder, settings)
    deltas = [engine.add_delta(_random_lora(decoder, number)) for number in range(num_loras)] or [None]

    def generate(requests: Requests) -> Answers:
        asked = {}
        for number, (ids, new_tokens) in enumerate(requests):
            asked[engine.add_request(ids, Sampling(max_tokens=new_tokens), deltas[number % len(deltas)])] = number
        answers: Answers = [[] for _ in requests]
        while engine.has_work:
            for event in engine.step():
                assert event.token is not None
                answers[asked[event.request_id]].append(event.token)
        return answers

    return generate


def _random_lora(decoder: Any, number: int) -> Any:
    """Of rank 8 on all linear layers."""
    import torch

    from app.config import LoraConfig
    from app.methods import apply_method
    from app.methods.delta import Delta
    from app.models.decoder import Decoder

    with torch.device("meta"):
        shapes = Decoder(decoder.config)
        method = LoraConfig(rank=8)
        apply_method(shapes, method)
    generator = torch.Generator().manual_seed(number)
    trained = {name: p.shape for name, p in shapes.named_parameters() if p.requires_grad}
    return Delta(method, {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in trained.items()}, {})


def transformers(model: str, precision: str, *, batch_size: int = 64) -> Generate:
    """`generate` over batches of requests of like length, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    @torch.inference_mode()
    def of_batch(batch: Requests) -> Answers:
        longest = max(len(ids) for ids, _ in batch)
        padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in batch])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in batch])
        new_tokens = max(count for _, count in batch)
        output = decoder.generate(
            padded, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return [row[longest : longest + count].tolist() for row, (_, count) in zip(output, batch, strict=True)]

    return lambda requests: _sorted_in_batches(requests, batch_size, of_batch)


def ctranslate2(model: str, precision: str, *, batch_size: int = 64) -> Generate:
    import ctranslate2 as library

    folder = Path(model).parent / "ctranslate2-model"
    if not folder.exists():
        library.converters.TransformersConverter(model).convert(str(folder))
    compute_type = {"fp32": "float32", "int8": "int8"}[precision]
    generator = library.Generator(
        str(folder), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=os.cpu_count() or 1
    )

    def of_batch(batch: Requests) -> Answers:
        new_tokens = max(count for _, count in batch)
        results = generator.generate_batch(
            [[f"t{number}" for number in ids] for ids, _ in batch], max_batch_size=batch_size, beam_size=1,
            sampling_topk=1, max_length=new_tokens, min_length=new_tokens, include_prompt_in_result=False,
            end_token=[],
        )  # fmt: skip
        return [result.sequences_ids[0][:count] for result, (_, count) in zip(results, batch, strict=True)]

    return lambda requests: _sorted_in_batches(requests, batch_size, of_batch)


def vllm(model: str, precision: str) -> Generate:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    dtype = {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16"}[precision]
    if precision == "int8":
        from benchmarks.generation.int8_checkpoint import int8_of

        model = str(int8_of(Path(model)))
    engine = LLM(model, dtype=dtype, max_model_len=512, max_num_seqs=128, skip_tokenizer_init=True)

    def generate(requests: Requests) -> Answers:
        parameters = [
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False) for _, count in requests
        ]
        outputs = engine.generate([{"prompt_token_ids": ids} for ids, _ in requests], parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def llamacpp(model: str, precision: str, *, batch_size: int = 64) -> Generate:
    from benchmarks.generation.llamacpp import batches, gguf_of

    of_batch = batches(gguf_of(Path(model), precision), batch_size=batch_size)
    return lambda requests: _sorted_in_batches(requests, batch_size, of_batch)


def _sorted_in_batches(requests: Requests, batch_size: int, of_batch: Callable[[Requests], Answers]) -> Answers:
    """Longest answers first, so that those of a batch end together."""
    order = sorted(range(len(requests)), key=lambda number: (-requests[number][1], len(requests[number][0])))
    answers: Answers = [[] for _ in requests]
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        for number, answer in zip(numbers, of_batch([requests[n] for n in numbers]), strict=True):
            answers[number] = answer
    return answers


CONTENDERS: dict[str, Callable[[str], Generate]] = {
    "pacos_fp32": lambda model: pacos(model, "fp32"),
    "pacos_bf16": lambda model: pacos(model, "bf16"),
    "pacos_int8": lambda model: pacos(model, "int8"),
    "pacos_nf4": lambda model: pacos(model, "nf4"),
    "pacos_fp32_torch": lambda model: pacos(model, "fp32", kernels="torch"),
    "pacos_fp32_32_loras": lambda model: pacos(model, "fp32", num_loras=32),
    "pacos_bf16_32_loras": lambda model: pacos(model, "bf16", num_loras=32),
    "pacos_int8_32_loras": lambda model: pacos(model, "int8", num_loras=32),
    "transformers_fp32": lambda model: transformers(model, "fp32"),
    "transformers_bf16": lambda model: transformers(model, "bf16"),
    "ctranslate2_fp32": lambda model: ctranslate2(model, "fp32"),
    "ctranslate2_int8": lambda model: ctranslate2(model, "int8"),
    "vllm_fp32": lambda model: vllm(model, "fp32"),
    "vllm_bf16": lambda model: vllm(model, "bf16"),
    "vllm_int8": lambda model: vllm(model, "int8"),
    "llamacpp_f16": lambda model: llamacpp(model, "f16"),
    "llamacpp_q8": lambda model: llamacpp(model, "q8"),
    "llamacpp_q4": lambda model: llamacpp(model, "q4"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=Path, required=True)
    arguments = parser.parse_args()
    requests: Requests = [(each["ids"], each["new_tokens"]) for each in json.loads(arguments.requests.read_text())]
    generate = CONTENDERS[arguments.name](arguments.model)
    generate([(ids[:8], 4) for ids, _ in requests[:4]])
    started = time.perf_counter()
    answers = generate(requests)
    seconds = time.perf_counter() - started
    lengths = [len(answer) for answer in answers]
    if lengths != [count for _, count in requests]:
        sys.exit("answers are not as long as asked for")
    unit = 1 if sys.platform == "darwin" else 1024
    result = {
        "tokens": sum(lengths),
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "digest": hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16],
        "first_tokens": [answer[0] for answer in answers[:64]],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
