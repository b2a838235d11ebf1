"""Attention without a KV cache: what each token of a row may see, and which kernel computes it."""

import functools
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from app.config.base import AttentionBackend
from app.errors import UserError
from app.models.kernels.causal_attention import Documents, can_attend, causal_attention

KeysValues = tuple[Tensor, Tensor]
"""One layer's keys and values, each [kv_heads, time, head_width]."""

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class RowAttention:
    """The decoder's `Context` in training: each row is a sequence, or, with `documents`, several end to end.

    A token sees those of its own document that are not later, and all of `prefix`, which stands before every document.
    Made anew for each forward pass; all layers share its masks. `lengths` are those of the documents, if known.
    """

    def __init__(
        self,
        documents: Tensor | None = None,
        *,
        prefix: Sequence[KeysValues] | None = None,
        backend: AttentionBackend = "auto",
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.documents = documents
        self.prefix = prefix
        self.backend = backend
        self._lengths = None
        if documents is not None and documents.device.type == "cpu" and backend != "flex":
            self._lengths = list(lengths) if lengths is not None else document_lengths(documents)
        self._is_apart = self._lengths is not None
        self._is_plain = prefix is None and (documents is None or self._is_apart)
        """Whether a token sees all that is not later, once documents are apart."""
        self._masks: dict[int, Any] = {}
        self._whole: Documents | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All [batch, heads, time, head_width]; keys and values may have fewer heads than queries."""
        with _kernel(self.backend):
            if self.backend == "auto" and self._is_plain and q.device.type == "cpu":
                mixed = self._attend_whole_documents(q, k, v)
                if mixed is not None:
                    return mixed
            # `_lengths` itself is not looked at here: compiled code would be made anew for each number of them.
            return (self._attend_each_document if self._is_apart else self._attend)(layer, q, k, v)

    # It and the next would be compiled anew for every number of documents. `torch.compiler.disable` is the same, but
    # imports the compiler at once: two seconds, in each process that has a model.
    @torch._disable_dynamo
    def _attend_whole_documents(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """All in one call; None where there is no kernel for it."""
        if not can_attend(q, k, v):
            return None
        if self._whole is None:
            batch, _, time, _ = q.shape
            self._whole = Documents(self._lengths or [time] * batch)
        return causal_attention(q, k, v, self._whole)

    @torch._disable_dynamo
    def _attend_each_document(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One after the other, where a kernel's start costs nothing: a mask over whole rows would have the scores
        between documents computed too, which are most of them, to be thrown away.

        Split and put together by one operation each: slices would each have a gradient as large as the whole.
        """
        ends_to_end = [part.transpose(1, 2).flatten(0, 1).split(self._lengths) for part in (q, k, v)]
        mixed = [
            self._attend(layer, *(part.transpose(0, 1).unsqueeze(0) for part in of_document)).squeeze(0).transpose(0, 1)
            for of_document in zip(*ends_to_end, strict=True)
        ]  # each [time of the document, heads, head_width]
        return torch.cat(mixed).unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.prefix is not None:
            k, v = (_prepend(before, after) for before, after in zip(self.prefix[layer], (k, v), strict=True))
        is_grouped = q.shape[1] != k.shape[1]
        if self.backend == "flex":
            return _flex_attention()(q, k, v, block_mask=self._mask(q, k), enable_gqa=is_grouped)
        mask = None if self._is_plain else self._mask(q, k)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self._is_plain, enable_gqa=is_grouped)

    def _mask(self, q: Tensor, k: Tensor) -> Any:
        """What `_attend` may see, for queries of this length."""
        length = q.shape[2]
        if length not in self._masks:
            documents = self.documents if self._lengths is None else None
            make = _block_mask if self.backend == "flex" else _mask
            self._masks[length] = make(documents, q, k)
        return self._masks[length]


def document_lengths(documents: Tensor) -> list[int]:
    """Lengths of the documents in `documents` [batch, time], row after row. Those of a row stand end to end."""
    rows = torch.arange(len(documents), device=documents.device).unsqueeze(1)
    numbers = (documents + rows * (documents.max() + 1)).flatten()
    return torch.unique_consecutive(numbers, return_counts=True)[1].tolist()


class Recorder:
    """A `Context` that keeps each layer's keys and values, of rows that are sequences of their own."""

    def __init__(self, *, backend: AttentionBackend = "auto") -> None:
        self.layers: list[KeysValues] = []
        self._rows = RowAttention(backend=backend)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer == len(self.layers):  # else the backward pass computes the block once more
            self.layers.append((k[0], v[0]))
        return self._rows.attend(layer, q, k, v)


@dataclass(frozen=True)
class Rows:
    """What attention is to be computed on; `is_packed`: rows hold several documents."""

    num_heads: int
    kv_heads: int
    head_width: int
    device: torch.device
    dtype: torch.dtype
    is_packed: bool
    has_prefix: bool = False

    @property
    def is_masked(self) -> bool:
        return self.is_packed or self.has_prefix

    def __str__(self) -> str:
        masked = " with a mask" if self.is_masked else ""
        return f"{self.device.type} in {str(self.dtype).removeprefix('torch.')}{masked}"


def choose_backend(backend: AttentionBackend, rows: Rows) -> str:
    """The kernel that will compute attention: `backend` itself, or for `auto` `c`, ours, or what torch picks for such
    rows.

    Raises:
        UserError: `backend` cannot train on them; naming those that can.
    """
    if reason := _why_not(backend, rows):
        others = [name for name in (*_KERNELS, "flex") if name != backend and not _why_not(name, rows)]
        raise UserError(f"attention={backend!r} cannot train on {rows} ({reason}); use one of: {', '.join(others)}")
    if backend != "auto":
        return backend
    q, k, v = _probe(rows)
    if not rows.has_prefix and can_attend(q, k, v):
        return "c"
    mask = _mask(_one_document(q), q, k) if rows.is_masked else None
    is_grouped = rows.num_heads != rows.kv_heads
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, 0.0, mask is None, enable_gqa=is_grouped))
    return {kernel: name for name, kernel in _KERNELS.items()}.get(choice, choice.name.lower())


def _why_not(backend: str, rows: Rows) -> str | None:
    """Why `backend` cannot compute attention and its gradient here, None where it can: by trying."""
    q, k, v = _probe(rows)
    attention = RowAttention(_one_document(q) if rows.is_masked else None, backend=cast(AttentionBackend, backend))
    try:
        with warnings.catch_warnings():  # torch explains there why each kernel will not do
            warnings.simplefilter("ignore")
            attention.attend(0, q, k, v).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0].rstrip(".")
    return None


def _probe(rows: Rows) -> list[Tensor]:
    shapes = [(1, heads, 128, rows.head_width) for heads in (rows.num_heads, rows.kv_heads, rows.kv_heads)]
    return [torch.zeros(shape, device=rows.device, dtype=rows.dtype, requires_grad=True) for shape in shapes]


def _one_document(q: Tensor) -> Tensor:
    return torch.zeros(q.shape[0], q.shape[2], dtype=torch.long, device=q.device)


def _prepend(before: Tensor, after: Tensor) -> Tensor:
    """`before` [heads, prefix, head_width] in front of each row of `after` [batch, heads, time, head_width]."""
    return torch.cat([before.to(after.dtype).expand(after.shape[0], -1, -1, -1), after], dim=2)


def _mask(documents: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """bool [batch or 1, 1, time, prefix + time]: whether a query (third axis) may see a key (fourth)."""
    time, length = q.shape[2], k.shape[2] - q.shape[2]
    seen = torch.ones(1, time, time, dtype=torch.bool, device=q.device).tril()
    if documents is not None:
        seen = seen & (documents.unsqueeze(2) == documents.unsqueeze(1))
    return F.pad(seen, (length, 0), value=True).unsqueeze(1)


def _block_mask(documents: Tensor | None, q: Tensor, k: Tensor) -> Any:
    """The same for flex attention, which skips blocks of the score matrix where nothing is seen."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, _, time, _ = q.shape
    length = k.shape[2] - time
    if documents is None:
        documents = _one_document(q)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key - length).clamp(min=0)
        return (key < length) | ((own <= query) & (documents[b, query] == documents[b, own]))

    return create_block_mask(sees, batch, None, time, time + length, device=q.device)


@functools.cache
def _flex_attention() -> Any:
    """Compiled, because flex attention holds the whole score matrix otherwise."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _kernel(backend: AttentionBackend) -> AbstractContextManager[Any]:
    return sdpa_kernel(_KERNELS[backend]) if backend in _KERNELS else nullcontext()
