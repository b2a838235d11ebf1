"""The GPU's way through the engine, by Triton's interpreter on a CPU and without recording: `test_decoding` runs this
as a process of its own. Tokens are compared with those of the eager engine."""

import torch

from app.engine.decode_model import DecodeModel
from app.engine.decoding import Decoding
from app.engine.engine import Engine
from app.engine.kernels import paged_attention
from app.engine.kernels.few_rows import FewRows
from app.engine.sampling import Sampling
from app.models.decoder import Decoder, DecoderConfig
from app.models.quantization import QuantizationConfig, quantize

# No context here is long enough to be split: of several programs for a row all but one would return at once, and to
# begin is most of what a program takes in the interpreter.
paged_attention._num_processors = lambda device: 1


def interpreted(model: Decoder, **changes) -> Engine:
    engine = Engine(model, kernels="torch", **changes)
    config, cache, runner = model.config, engine._cache, engine._runner
    attention = paged_attention.PagedAttention(
        max_rows=8, num_heads=config.num_heads, head_width=config.head_width, device=torch.device("cpu")
    )
    runner.paged = attention
    step_model = DecodeModel(model, runner.head, cache, attention, FewRows())
    assert step_model.is_fused
    engine._decoding = Decoding(step_model, cache, max_rows=8, max_blocks=-(-config.context_length // 16))
    return engine


def answers(engine: Engine, prompts: list[list[int]]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for number, ids in enumerate(prompts):
        engine.add_request(ids, Sampling(max_tokens=3, temperature=0.7 if number == 2 else 0.0, seed=number))
    while engine.has_work:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).append(event.token)
    return tokens


def check(kind: str) -> None:
    torch.manual_seed(3)
    config = DecoderConfig(61, 48, num_layers=2, num_heads=2, width=32, mlp_width=48)
    if kind == "llama":
        config = DecoderConfig(
            61, 48, num_layers=2, num_heads=4, width=32, mlp_width=48, norm="rms_norm", positions="rotary",
            activation="swiglu", num_kv_heads=2, bias=False,
        )  # fmt: skip
    model = Decoder(config)
    model.initialize(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12.0)
    if kind.startswith("int8"):
        quantize(model, QuantizationConfig.model_validate({"scheme": kind}))
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 61, (length,), generator=draw).tolist() for length in (5, 1, 17, 2, 16)]
    # Kernels for few rows; and the decoder's modules, which call no kernel for int8 that other engines do not call.
    for count in (1, 3) if kind.startswith("int8") else (1, 3, 5):
        changes = {"max_batch_size": 5, "max_queue": 8}
        expected = answers(Engine(model, kernels="torch", **changes), prompts[:count])
        engine = interpreted(model, **changes)
        assert answers(engine, prompts[:count]) == expected, (kind, count)
        assert engine._decoding is not None and (engine._decoding.num_ahead > 0) == (count == 1)


with torch.no_grad():
    for kind in ("gpt2", "llama", "int8_weight", "int8_dynamic"):
        check(kind)
