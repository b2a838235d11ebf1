"""Cross-entropy of the tied head without its logits, as Liger Kernel does it (Hsu et al. 2024, arXiv:2410.10989).

Logits [rows, vocab] and their gradient are by far the largest tensors of training a small model. Here they exist for
a chunk of rows at a time: the forward pass computes a chunk's logits, its loss, and at once its gradients, in the
place of the logits. Only d rows [rows, width] and, where the head is trained, d weight [vocab, width] outlive it.

`reference_cross_entropy` defines the loss. A chunk's logits are handled by a kernel in Triton on CUDA, by one in C on a
CPU, and by torch where those cannot be had.
"""

import functools
import logging
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from app.models.kernels.cpu import kernels_for
from app.models.kernels.notices import say_once

# Logits held at a time. Longer chunks read the head's weight less often, shorter ones need less memory. Measured on a
# CPU with GPT-2's head: at 64 MiB it is as fast as in one piece. For a GPU it is a guess: enough rows to fill it.
CHUNK_BYTES = {"cpu": 64 * 2**20}
OTHER_CHUNK_BYTES = 256 * 2**20
# oneDNN, which multiplies bf16 on a CPU, compiles its products for each shape and keeps what it compiled, hundreds of
# MiB with a new number of rows at every step: rows are rounded up to a multiple.
ONEDNN_ROWS = 64
# Matrix units are fed from rows that begin at multiples of 16 bytes or more: with GPT-2's 50,257 logits of two bytes a
# row, only every eighth does. On a CPU with AMX the head's products take twice as long then. So its rows of zeros.
VOCAB_MULTIPLE = 64
# On a CPU softmax goes by blocks of rows. They should fit its last cache, to be there still at the next pass; but each
# is some operations more, at whose ends threads wait for each other, which is slow where other programs run too.
CACHE_BYTES = 16 * 2**20


class ChunkKernel(Protocol):
    def __call__(self, logits: Tensor, labels: Tensor, *, smoothing: float, with_gradient: bool) -> Tensor:
        """Sum of -log p of `logits` [rows, vocab] under the smoothed labels, at least in fp32.

        `with_gradient`, it overwrites `logits` with the sum's gradient, softmax(logits) - smoothed labels.
        """
        ...


def reference_cross_entropy(rows: Tensor, weight: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """What `fused_cross_entropy` computes, with all logits in memory."""
    logits = F.linear(rows, weight)
    logits = logits.to(_loss_dtype(logits.dtype))
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)


def fused_cross_entropy(
    rows: Tensor, weight: Tensor, labels: Tensor, *, smoothing: float = 0.0, chunk_rows: int | None = None
) -> Tensor:
    """Sum of -log p(label) over `rows` [rows, width], with the head `weight` [vocab, width] and int64 `labels` [rows].

    With `smoothing` ε a label is the token at 1 - ε, and all tokens of the vocabulary at ε / vocab each, itself too
    (Szegedy et al. 2015, arXiv:1512.00567).

    A scalar in fp32 (fp64 for fp64). Under autocast the products are in its dtype and the loss in fp32; the weight is
    then copied in that dtype, as autocast does. `chunk_rows` defaults to what `CHUNK_BYTES` hold. It is differentiable
    once.
    """
    return cast(Tensor, _FusedCrossEntropy.apply(rows, weight, labels, smoothing, chunk_rows, torch.is_grad_enabled()))


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        smoothing: float,
        chunk_rows: int | None,
        is_recorded: bool,
    ) -> Tensor:
        # needs_input_grad does not heed no_grad, and within forward nothing is recorded: hence is_recorded.
        grad_rows = torch.empty_like(rows) if is_recorded and ctx.needs_input_grad[0] else None
        grad_weight = None
        if is_recorded and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=_loss_dtype(weight.dtype))
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_rows, grad_weight)
        return _accumulate(rows, weight, labels, smoothing, chunk_rows, grad_rows, grad_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_weight = ctx.saved_tensors
        if grad_rows is not None:
            grad_rows = _scaled(grad_rows, grad_output, grad_rows.dtype)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, grad_output, ctx.weight_dtype)
        return grad_rows, grad_weight, None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient` · `factor` in `dtype`, in one pass. Not in place: a graph that is kept needs it a second time.

    With an axis the fp32 factor counts in type promotion: fp16 could not hold a loss scale of 65,536.
    """
    return torch.mul(gradient, factor.reshape(1), out=torch.empty_like(gradient, dtype=dtype))


def _accumulate(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    smoothing: float,
    chunk_rows: int | None,
    grad_rows: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """The loss, chunk by chunk; fills `grad_rows` and adds to `grad_weight`, where given."""
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    kernel = _kernel_for(rows.device)
    with_gradient = grad_rows is not None or grad_weight is not None
    loss = torch.zeros((), dtype=_loss_dtype(dtype), device=rows.device)
    size = chunk_rows or chunk_rows_on(device, len(rows), row_bytes=len(weight) * dtype.itemsize)
    multiple = ONEDNN_ROWS if device == "cpu" and dtype == torch.bfloat16 else 1
    size += -size % multiple
    vocab_size = len(weight)
    num_filling = -vocab_size % VOCAB_MULTIPLE if dtype.itemsize == 2 else 0
    num_rows = min(size, len(rows) + -len(rows) % multiple)
    buffer = torch.empty(num_rows, vocab_size + num_filling, dtype=dtype, device=rows.device)
    with torch.autocast(device, enabled=False):
        if num_filling:
            filled = torch.empty(buffer.shape[1], weight.shape[1], dtype=dtype, device=weight.device)
            filled[:vocab_size], filled[vocab_size:] = weight, 0
            weight = filled
        weight = weight.to(dtype)
        for start in range(0, len(rows), size):
            answers = labels[start : start + size]
            chunk = F.pad(rows[start : start + size].to(dtype), (0, 0, 0, -len(answers) % multiple))  # [chunk, width]
            logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])  # [chunk, vocab]
            known = logits[: len(answers), :vocab_size]
            loss += kernel(known, answers, smoothing=smoothing, with_gradient=with_gradient)
            # Logits are their gradient by now. Those that fill up are zero, of rows and of the vocabulary.
            if grad_rows is not None:
                grad_rows[start : start + size] = (logits @ weight)[: len(answers)]
            if grad_weight is not None:
                _add_product(grad_weight, logits[:, :vocab_size].T, chunk)
    return loss


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total` += `left` @ `right`, in `total`'s dtype, which may be wider than theirs."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def chunk_rows_on(device: str, num_rows: int, *, row_bytes: int) -> int:
    """Rows of each of the fewest chunks of equal length that keep to the budget."""
    most = max(1, CHUNK_BYTES.get(device, OTHER_CHUNK_BYTES) // row_bytes)
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def version_on(device: torch.device) -> str:
    """Which of the versions computes on `device`, in fp32 or bf16: `triton`, `c` or `torch`."""
    if device.type == "cpu":
        return "torch" if kernels_for(torch.empty(0)) is None else "c"
    return "torch" if _kernel_for(device) is _torch_loss_and_gradient else "triton"


@functools.cache
def _kernel_for(device: torch.device) -> ChunkKernel:
    if device.type == "cpu":
        return _loss_and_gradient_on_cpu
    if device.type != "cuda":
        return _torch_loss_and_gradient
    try:
        from app.models.kernels.cross_entropy_triton import loss_and_gradient

        # Triton compiles at the first call, and needs a C compiler for it: a trial tells now whether it can.
        trial = torch.zeros(1, 32, device=device)
        labels = torch.zeros(1, dtype=torch.int64, device=device)
        loss_and_gradient(trial, labels, smoothing=0.0, with_gradient=True)
        return loss_and_gradient
    except Exception as error:  # no Triton, no compiler, an unknown GPU: Triton's errors have no class in common
        say_once(logging.WARNING, f"fused_cross_entropy: no Triton kernel, torch computes it; because: {error}")
        return _torch_loss_and_gradient


def _loss_and_gradient_on_cpu(logits: Tensor, labels: Tensor, *, smoothing: float, with_gradient: bool) -> Tensor:
    """A `ChunkKernel`."""
    kernels = kernels_for(logits)
    compute = _torch_loss_and_gradient if kernels is None else kernels.cross_entropy
    return compute(logits, labels, smoothing=smoothing, with_gradient=with_gradient)


def _torch_loss_and_gradient(logits: Tensor, labels: Tensor, *, smoothing: float, with_gradient: bool) -> Tensor:
    """A `ChunkKernel` for any device."""
    dtype = _loss_dtype(logits.dtype)
    loss = torch.zeros((), dtype=dtype, device=logits.device)
    block_rows = len(logits)
    if logits.device.type == "cpu":
        block_rows = max(1, CACHE_BYTES // (logits.shape[1] * dtype.itemsize))
    for block, answers in zip(logits.split(block_rows), labels.unsqueeze(1).split(block_rows), strict=True):
        loss += _block_loss(block, answers, dtype, smoothing=smoothing, with_gradient=with_gradient)
    return loss


def _block_loss(block: Tensor, answers: Tensor, dtype: torch.dtype, *, smoothing: float, with_gradient: bool) -> Tensor:
    """A `ChunkKernel`'s work on some of its rows, in `dtype`; `answers` are the labels [rows, 1]."""
    log_p = F.log_softmax(block, dim=1, dtype=dtype)
    loss = (smoothing - 1) * log_p.gather(1, answers).sum()
    if smoothing:
        loss -= smoothing / block.shape[1] * log_p.sum()
    if with_gradient:
        # Less one in `dtype`: bf16 would round the p of a sure answer to 1, and its gradient to 0.
        gradient = torch.exp(log_p, out=block if block.dtype == dtype else log_p)
        gradient.scatter_add_(1, answers, gradient.new_full((), smoothing - 1).expand_as(answers))
        if smoothing:
            gradient -= smoothing / block.shape[1]
        if gradient is not block:
            block.copy_(gradient)
    return loss
