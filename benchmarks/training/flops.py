"""What a training step must compute, and how much this machine can: numerator and denominator of MFU.

Only what the mathematics asks for counts: no padding, no head over tokens without a label, no recomputation, half of
the score matrix, no gradient of a frozen weight and none of the embeddings.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from app.models.decoder import GPT2_SIZES, DecoderConfig

GPT2 = GPT2_SIZES["gpt2"]


def lora_step_flops(shape: DecoderConfig, lengths: Sequence[int], *, answers: int, rank: int) -> float:
    """FLOPs of forward and backward pass with LoRA of `rank` on every linear layer of the blocks.

    `lengths` are those of the documents, `answers` is how many of their tokens are in the loss; a multiplication and
    an addition are two. With the sum of tokens T, the linear layers' N = Σ in · out and R = Σ r (in + out) over them:

        linear layers   2 N T forward, 2 N T backward (to their inputs alone)
        LoRA            2 R T forward, 4 R T backward (to inputs and to A and B)
        head            2 · width · vocab · answers forward, as much backward
        attention       4 · width · layers · pairs forward, twice that backward

    less the gradient of the first layer's input, which nothing needs.
    """
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return (
        _linear_flops(shape, sum(lengths), rank=rank)
        + 2 * 2 * shape.width * shape.vocab_size * answers
        + 3 * attention_flops(shape, pairs)
    )


def full_step_flops(shape: DecoderConfig, lengths: Sequence[int], *, answers: int) -> float:
    """The same where all weights train: 6 N T, the head likewise, attention, less the first layer's input."""
    tokens = sum(lengths)
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    weights = sum(inputs * outputs for inputs, outputs in _linear_shapes(shape))
    # The first layer's input has a gradient here: that of the embeddings.
    return (
        6 * weights * shape.num_layers * tokens
        + 3 * 2 * shape.width * shape.vocab_size * answers
        + 3 * attention_flops(shape, pairs)
    )


def attention_flops(shape: DecoderConfig, pairs: float) -> float:
    """Of the forward pass: scores and mixed values of so many pairs of a query and a key, in all layers."""
    return 4 * shape.width * shape.num_layers * pairs


def _linear_flops(shape: DecoderConfig, tokens: int, *, rank: int) -> float:
    layers = _linear_shapes(shape)
    weights = sum(inputs * outputs for inputs, outputs in layers)
    factors = sum(rank * (inputs + outputs) for inputs, outputs in layers)
    first_inputs, first_outputs = layers[0]
    unneeded = 2 * first_inputs * first_outputs + 2 * rank * first_inputs
    return tokens * (shape.num_layers * (4 * weights + 6 * factors) - unneeded)


def _linear_shapes(shape: DecoderConfig) -> list[tuple[int, int]]:
    """(in, out) of a GPT-2 block's matrices, in the order of the forward pass."""
    width, mlp = shape.width, shape.mlp_width
    return [(width, 3 * width), (width, width), (width, mlp), (mlp, width)]


SHAPES = (
    (1024, 1024, 1024),
    (1600, 768, 3072),
    (1600, 3072, 768),
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (8192, 8192, 8192),
)
"""Rows, inner size and columns of the matrix products that are tried, the smallest first."""
LONGEST_S = 2.0
"""Of the runs of one product; a product that would take longer is not tried."""


def machine_peak(threads: int) -> dict[str, Any]:
    """The most FLOP/s of any matrix product tried, by number format; and the best of all, which MFU is measured by.

    On a CPU torch's own product and oneDNN's with a prepacked weight: which is faster depends on the machine.
    """
    import torch

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16}
    measured = {name: best_product(dtype, device=cpu) for name, dtype in formats.items()}
    return {**measured, "flops_per_s": max(best["flops_per_s"] for best in measured.values())}


def best_product(dtype: Any, *, device: Any) -> dict[str, Any]:
    """The fastest matrix product in `dtype` on `device`: which it is, and its FLOP/s."""
    best: dict[str, Any] = {"flops_per_s": 0.0}
    for shape in SHAPES:
        flops = 2.0 * shape[0] * shape[1] * shape[2]
        if best["flops_per_s"] and flops / best["flops_per_s"] > LONGEST_S:  # bf16 that is emulated
            continue
        for kind, product in _products(shape, dtype, device).items():
            rate = _rate(product, flops, device)
            if rate > best["flops_per_s"]:
                best = {"product": kind, "shape": list(shape), "flops_per_s": rate}
    return best


def _products(shape: tuple[int, int, int], dtype: Any, device: Any) -> dict[str, Callable[[], Any]]:
    import torch

    rows, inner, columns = shape
    left, weight = (torch.randn(size, inner, device=device).to(dtype) for size in (rows, columns))
    products: dict[str, Callable[[], Any]] = {"torch": lambda: torch.mm(left, weight.T)}
    if device.type != "cpu":
        return products
    try:
        ops: Any = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(weight, rows)
    except (AttributeError, RuntimeError):  # torch was built without oneDNN, or it has no such product on this machine
        return products
    return {**products, "oneDNN, prepacked": lambda: ops._linear_pointwise(left, packed, None, "none", [], "")}


def _rate(product: Callable[[], Any], flops: float, device: Any) -> float:
    """FLOP/s of the fastest of up to 10 runs, fewer where the product is slow: a peak is what is possible."""
    import torch

    calls = 1 if device.type == "cpu" else 20  # a GPU is given several at once, for it starts them by the microsecond
    synchronize = (lambda: None) if device.type == "cpu" else torch.cuda.synchronize
    product()
    synchronize()
    seconds: list[float] = []
    while len(seconds) < 10 and sum(seconds) < LONGEST_S:
        started = time.perf_counter()
        for _ in range(calls):
            product()
        synchronize()
        seconds.append((time.perf_counter() - started) / calls)
    return flops / min(seconds)
