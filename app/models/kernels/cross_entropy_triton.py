"""Cross-entropy and its gradient on CUDA, in Triton. Imported where needed: Triton may be missing."""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

# Threads own distinct entries of a block, 4096 / (32 · 8) each: a thread that owned one twice would read its own
# gradient as a logit. So the block does not shrink with the vocabulary; the mask does that.
BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits, labels, losses, row_stride, vocab_size, smoothing, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row. `logits` become softmax(logits) - smoothed label if WITH_GRADIENT; `losses` are -log p."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row)
    # Read before the loop, whose reductions hold all threads together, because later another thread overwrites it.
    # A label outside the vocabulary has no logit to read; its loss is NaN.
    is_known = (label >= 0) & (label < vocab_size)
    answer = tl.load(logits + label, mask=is_known, other=float("nan")).to(tl.float32)

    # Online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867): maximum and sum in one reading.
    maximum = float("-inf")
    total = 0.0
    sum_of_logits = 0.0
    for start in range(0, vocab_size, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        block = tl.load(logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(block, 0))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(block - larger), 0)
        maximum = larger
        sum_of_logits += tl.sum(tl.where(entries < vocab_size, block, 0.0), 0)
    log_total = maximum + tl.log(total)
    share = smoothing / vocab_size
    tl.store(losses + row, log_total - (1 - smoothing) * answer - share * sum_of_logits)

    if WITH_GRADIENT:
        for start in range(0, vocab_size, BLOCK):
            entries = start + tl.arange(0, BLOCK)
            block = tl.load(logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(block - log_total) - tl.where(entries == label, 1 - smoothing, 0.0) - share
            tl.store(logits + entries, gradient, mask=entries < vocab_size)


def loss_and_gradient(logits: Tensor, labels: Tensor, *, smoothing: float, with_gradient: bool) -> Tensor:
    """Sum of -log p, fp32, of `logits` [rows, vocab] under smoothed labels; these become their gradient."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(len(logits),)](
            logits,
            labels.contiguous(),
            losses,
            logits.stride(0),
            logits.shape[1],
            smoothing,
            with_gradient,
            BLOCK,
            num_warps=NUM_WARPS,
        )
    return losses.sum()
