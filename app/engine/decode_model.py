"""The base's own decoder for steps with one row a sequence, on a GPU: tensors of fixed shape in, logits out.

Nothing here looks at a value on the host, so a step can be recorded. Few rows go through kernels that compute all that
lies between two products within them; more, and models of other layers, through the decoder's modules.
"""

from typing import cast

import torch
from torch import Tensor, nn

from app.engine.kernels.few_rows import FEW_ROWS, FewRows, suits
from app.engine.kernels.paged_attention import PagedAttention
from app.engine.kv_cache import KVCache
from app.models.decoder import MLP, Attention, Block, Decoder, Rotation, rotate, rotation_of


class DecodeModel:
    """`head` makes logits of the final norm's results."""

    def __init__(
        self, model: Decoder, head: nn.Module, cache: KVCache, attention: PagedAttention, few_rows: FewRows
    ) -> None:
        self.model = model
        self.head = head
        self.cache = cache
        self.few_rows = few_rows
        self._attention = attention
        self.is_fused = _is_plain(model, head)
        """Whether few rows go through the kernels for them."""

    def logits(self, ids: Tensor, seen: Tensor, tables: Tensor) -> Tensor:
        """[rows, vocab_size] after the tokens `ids`, each the last of the places `seen` of a sequence with the blocks
        `tables` [rows, blocks]; int32 [rows], of one stride. Their keys and values enter the cache. Rows that have seen
        nothing only fill up."""
        rows = _Rows(self.cache, self._attention, seen, tables)
        if self.is_fused and len(ids) <= FEW_ROWS:
            return self._fused_logits(ids, rows)
        positions = (seen - 1).clamp_min(0).unsqueeze(0)
        embedded = self.model.token_embedding(ids).unsqueeze(0)
        hidden = self.model.final_norm(self.model.run_blocks(embedded, positions, rows))[0]
        return self.head(hidden)

    def take_largest(self, logits: Tensor, tokens: Tensor, ids: Tensor, seen: Tensor) -> None:
        self.few_rows.take_largest(logits, tokens, ids, seen)

    def _fused_logits(self, ids: Tensor, rows: "_Rows") -> Tensor:
        model, rotation, places = self.model, None, None
        if model.config.positions == "learned":
            places = model.position_embedding.weight
        else:
            rotation = rotation_of((rows.seen - 1).clamp_min(0), model.config)  # [1, rows, head_width / 2]
        x = self.few_rows.embed(ids, rows.seen, model.token_embedding.weight, places)
        for block in model.blocks:
            x = self._through(cast(Block, block), x, rows, rotation)
        return self.few_rows.linear(self.head, x, norm=model.final_norm)

    def _through(self, block: Block, x: Tensor, rows: "_Rows", rotation: Rotation | None) -> Tensor:
        """A block, of `x` [rows, width]."""
        linear, attn, mlp = self.few_rows.linear, block.attn, block.mlp
        heads = linear(attn.qkv, x, norm=block.attn_norm).view(len(x), -1, attn.head_width)
        q, k, v = heads.split(attn.heads, dim=1)  # each [rows, heads, head_width]
        if rotation is not None:
            q, k = (rotate(part.transpose(0, 1), rotation).transpose(0, 1) for part in (q, k))
        x = linear(attn.out, rows.mixed(attn.layer, q, k, v).flatten(1), residual=x)
        is_gelu = self.model.config.activation == "gelu"
        inner = linear(mlp.up, x, norm=block.mlp_norm, is_gelu=is_gelu)
        return linear(mlp.down, inner if is_gelu else mlp.activation(inner), residual=x)


class _Rows:
    """`Context` of rows of which each is the newest of a sequence."""

    def __init__(self, cache: KVCache, attention: PagedAttention, seen: Tensor, tables: Tensor) -> None:
        self._cache, self._attention = cache, attention
        self.seen, self._tables = seen, tables

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))
        return self.mixed(layer, q, k, v).transpose(0, 1).unsqueeze(0)

    def mixed(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[rows, heads, head_width], of `q` likewise."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._attention.attend_new(q, k, v, self._cache.layers[layer], out, tables=self._tables, seen=self.seen)
        return out


def _is_plain(model: Decoder, head: nn.Module) -> bool:
    blocks = all(
        type(block) is Block
        and type(block.attn) is Attention
        and type(block.mlp) is MLP
        and suits(block.attn.qkv, block.attn_norm)
        and suits(block.attn.out)
        and suits(block.mlp.up, block.mlp_norm)
        and suits(block.mlp.down)
        for block in model.blocks
    )
    return blocks and suits(head, model.final_norm) and type(model.token_embedding) is nn.Embedding
