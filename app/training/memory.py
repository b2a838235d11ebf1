"""What memory a training worker needs, told from shapes and settings before anything is computed.

Weights, gradients and optimizer state follow from the parameters and what ZeRO partitions. What the backward pass needs
is found by running a micro-batch through the model with torch's fake tensors, which have shapes and no content: every
operation happens, and each tensor's bytes are counted from its making to its end. So any technique, precision and
checkpointing is counted as it is, without a formula of its own; a Python object a tensor is all that it costs.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.config.base import Precision
from app.models.decoder import Decoder
from app.models.kernels.cross_entropy import chunk_rows_on, fused_cross_entropy
from app.models.precision import compute_dtype
from app.models.quantization.int8 import IntegerLinear
from app.training.optimizer import MOMENTS, trained_parameters

RAY_WORKER_BYTES = 120 * 2**20
"""What a Ray Train worker holds beyond a plain process with the same imports: its part of the object store, gloo's
buffers, threads. Measured with Ray 2.60 on Linux: what runs took beyond their trials, of three LoRA runs."""


@dataclass(frozen=True)
class Shape:
    """A micro-batch, as far as memory depends on it."""

    rows: int
    length: int
    """Tokens of a row, padding among them."""
    loss_tokens: int
    document_lengths: tuple[int, ...] | None
    """Of all rows, one after the other, where a row may hold several documents."""
    micro_batches: int = 1
    """How many of them a worker computes in a step."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker when it holds the most."""

    process: int
    """Python and libraries, before the model; none on a GPU."""
    frozen_weights: int
    trained_weights: int
    """With the copies of them that DeepSpeed updates."""
    gradients: int
    optimizer: int
    activations: int
    """What is kept for the backward pass and computed there, beside the gradients."""
    logits: int
    """The chunk of them that the loss holds."""
    allocator: int = 0
    """Freed, and kept by the C library to use again; measured."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def plain_memory(model: Decoder, shape: Shape, *, precision: Precision, device: str, process: int) -> Memory:
    """Of training `model`, of which the shapes are enough, in one process with torch's AdamW."""
    parameters = list(model.parameters())
    trained = sum(parameter.nbytes for parameter in trained_parameters(model).values())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    needed, logits = simulate(model, shape, precision=precision, device=device)
    return Memory(
        process=process,
        frozen_weights=sum(parameter.nbytes for parameter in parameters) - trained + buffers,
        trained_weights=trained,
        gradients=trained,
        optimizer=len(MOMENTS) * 4 * sum(p.numel() for p in parameters if p.requires_grad),
        activations=needed - trained - min(logits, needed - trained),
        logits=min(logits, needed - trained),
    )


def worker_memory(plain: Memory, *, zero_stage: int, workers: int, is_gpu: bool, allocator: int = 0) -> Memory:
    """The same in one of `workers` Ray Train workers under DeepSpeed.

    Beside the parameters, ZeRO keeps what a worker updates in a copy of its own. Gradients are gathered in one bucket;
    then each worker's part is copied from it, and, before ZeRO-1 lets the bucket go, copied once more into a flat one.
    Where all gradients are there, activations no longer are: so of both excesses the larger counts. ZeRO-3 keeps a part
    of all weights, and beside it, while a step runs, whole ones: all of them in models of less than 1e9 weights.
    """
    trained, gradients = plain.trained_weights, plain.gradients
    part = 1 / workers if zero_stage else 1.0
    weights_share = 1 + part if zero_stage == 3 else 1.0
    copies = {0: gradients, 1: round(2 * gradients * part)}.get(zero_stage, round(gradients * part))
    return Memory(
        process=plain.process + (0 if is_gpu else RAY_WORKER_BYTES),
        frozen_weights=round(plain.frozen_weights * weights_share),
        trained_weights=round(trained * weights_share) + (round(trained * part) if zero_stage else 0),
        gradients=gradients + max(0, copies - plain.activations - plain.logits),
        optimizer=round(plain.optimizer * part),
        activations=plain.activations,
        logits=plain.logits,
        allocator=allocator,
    )


def simulate(model: Decoder, shape: Shape, *, precision: Precision, device: str) -> tuple[int, int]:
    """(bytes beside weights and optimizer when most is held, logits among them) of one step's forward and backward.

    It runs as on a CPU in any case: what is kept is the same. `device` says how long the loss's chunks are.
    """
    dtype = compute_dtype(precision, torch.device(device))
    # Real tensors are let in: the tables by which NF4 is unpacked, which are no part of the model.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.autocast("cpu", dtype, enabled=dtype != torch.float32), _on_fake_device(model):
        row_bytes = model.config.vocab_size * dtype.itemsize
        chunk = chunk_rows_on(device, shape.loss_tokens, row_bytes=row_bytes)
        places = torch.zeros(shape.rows, shape.length, dtype=torch.long)
        with _Counter(model) as counter:
            for _ in range(min(2, shape.micro_batches)):  # the second finds the first's gradients there
                if shape.document_lengths is None:
                    hidden = model(places)
                else:
                    lengths = shape.document_lengths
                    hidden = model(places, positions=places, documents=places, document_lengths=lengths)
                counted = hidden.flatten(0, 1)[: shape.loss_tokens].clone()  # [loss_tokens, width]
                labels = torch.zeros(shape.loss_tokens, dtype=torch.long)
                loss = fused_cross_entropy(counted, model.token_embedding.weight, labels, chunk_rows=chunk)
                del hidden, counted
                loss.backward()
    model.zero_grad()
    return counter.most, chunk * row_bytes


@contextmanager
def _on_fake_device(model: Decoder) -> Iterator[None]:
    """`model`, its tensors on a CPU that is not there, for the block."""
    before = {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    integer_layers = [layer for layer in model.modules() if isinstance(layer, IntegerLinear)]
    is_training, attention = model.training, model.attention
    model.train()
    if attention == "flex":  # keeps what the others keep, and would be compiled
        model.attention = "auto"
    for name, tensor in before.items():
        fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        _put(model, name, fake)
    for layer in integer_layers:  # packing takes real weights
        layer.product = _ProductOfShapes(layer.out_features)
    try:
        yield
    finally:
        for name, tensor in before.items():
            _put(model, name, tensor)
        for layer in integer_layers:
            layer.product = None
        model.train(is_training)
        model.attention = attention


@dataclass(frozen=True)
class _ProductOfShapes:
    """[rows, in] -> [rows, columns], without a weight."""

    columns: int

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.new_empty(len(rows), self.columns)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    *path, last = name.split(".")
    held: Any = model.get_submodule(".".join(path))
    (held._parameters if isinstance(tensor, nn.Parameter) else held._buffers)[last] = tensor


class _Counter(TorchDispatchMode):
    """Counts the bytes of all tensors made within it that are still there; those of `model` do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self._held = {_key(tensor) for tensor in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._held:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._held.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
