"""Deltas of different techniques over one base, in one batch.

The base's layers stand in `Site`s. A step's rows are ordered by delta, and a site computes the base's layer for all of
them at once; then each delta's rows get what its technique makes of the result. Extra blocks are run for their delta's
rows alone, and a prefix or prompt is keys and values that stand in the cache before a sequence. So a row's answer is
that of its delta alone.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from app.config.methods import name_of, parts_of
from app.engine.fused_block import FusedBlock, fused
from app.engine.kernels import Before, CachedLayer, Kernels, lora_factors
from app.engine.kernels.blocks import CompiledBlocks, LowRank, Updates, library_of_blocks
from app.engine.kernels.products import products
from app.engine.packing import pack
from app.engine.site import Site, differs, is_low_rank
from app.errors import UserError
from app.methods import apply_method
from app.methods.adapter import Adapted
from app.methods.delta import Delta, check_extent, load_trained
from app.methods.lora import DoraLinear, LoraLinear
from app.methods.over_base import shared_copy
from app.models.attention import KeysValues
from app.models.decoder import Block, Decoder
from app.models.quantization import QuantizedLinear
from app.models.quantization.int8 import IntegerLinear

_LAYERS = (nn.Linear, QuantizedLinear, nn.LayerNorm, nn.RMSNorm)
_OWN_MODELS = {"full", "freeze"}
_PRODUCTS = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
"""A block's, in the order in which they come."""


def needs_own_model(delta: Delta) -> bool:
    """Whether it trains the base's own weights, so that no batch can hold its rows beside the base's."""
    return bool(_OWN_MODELS & {part.type for part in parts_of(delta.method)})


class UnknownDelta(Exception):
    """No delta of this hash is loaded (any more); load it and ask again."""


class DeltasFull(Exception):
    """The loaded deltas that are pinned or in use leave no room for another; try again later."""


@dataclass(eq=False)
class Variant:
    """What a delta puts into the base's places; the base itself, with an empty hash, puts nothing."""

    hash: str
    layers: dict[str, nn.Module] = field(default_factory=dict)
    """By the name of the base's layer, those that differ from it."""
    blocks_after: dict[int, list[Block]] = field(default_factory=dict)
    """Extra blocks by the number of the base's block that they follow; -1: they come first."""
    prefix: list[KeysValues] | None = None
    """Of each layer of the cache, [kv_heads, prefix_length, head_width]."""
    low_rank: LowRank | None = None
    """What it puts into the blocks, where that is low-rank updates and nothing else."""
    num_bytes: int = 0
    is_pinned: bool = False
    num_requests: int = 0

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix is None else self.prefix[0][0].shape[1]

    @property
    def leaves_blocks(self) -> bool:
        """Whether it puts nothing into them; a prefix is in the cache."""
        return not self.blocks_after and not any(name.startswith("blocks.") for name in self.layers)

    @property
    def root_key(self) -> bytes:
        """Whence the keys of its blocks in the cache follow. The base is the engine's, and the same for all."""
        return bytes.fromhex(self.hash) if self.hash else b"base"


class BlockSite(nn.Module):
    """A block of the base, and extra blocks around it that only some rows go through."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.before: list[tuple[slice, list[Block]]] = []
        self.after: list[tuple[slice, list[Block]]] = []

    def forward(self, x: Tensor, context: Any, rotation: Any) -> Tensor:
        if self.before:
            x = _through(x.clone(), self.before, context, rotation)
        return _through(self.base(x, context, rotation), self.after, context, rotation)


class MixedModel:
    """`decoder`, whose weights are the base's own, with a site in each place where deltas differ."""

    def __init__(
        self, base: Decoder, *, num_extra_layers: int, kernels: Kernels | None, is_packed: bool = False
    ) -> None:
        self.base = base
        self.num_extra_layers = num_extra_layers
        self.decoder, _ = shared_copy(base)
        self._kernels = kernels
        self._sites: dict[str, Site] = {}
        self._is_plain = base.prefix is None and not any(isinstance(m, LoraLinear | Adapted) for m in base.modules())
        for name, module in list(self.decoder.named_modules()) if self._is_plain else ():
            if isinstance(module, _LAYERS):
                self._sites[name] = Site(pack(module, kernels, is_packed=is_packed), kernels)
                parent, _, attribute = name.rpartition(".")
                setattr(self.decoder.get_submodule(parent), attribute, self._sites[name])
        last = self.decoder.blocks[-1]
        self._blocks = [
            BlockSite(fused(block, kernels, is_last=block is last) or block) for block in self.decoder.blocks
        ]
        self.decoder.blocks = nn.ModuleList(self._blocks)
        ends = f"blocks.{len(self._blocks) - 1}.", "final_norm"
        self._late = [name for name in self._sites if name.startswith(ends)]
        """Sites of the last block and after it, which are used one by one even where the blocks run in one call."""
        self._early = [name for name in self._sites if not name.startswith(ends)]
        self._groups: list[tuple[Variant, slice]] = []
        self._updates: Updates | None = None
        self._are_early_set = True

    def serve(self, groups: list[tuple[Variant, slice]]) -> None:
        """The next step's rows; each slice of them is a variant's."""
        if groups == self._groups:
            return
        self._groups, self._updates, self._are_early_set = groups, None, False
        self._activate(self._late)
        for number, block in enumerate(self._blocks):
            block.after = [(rows, v.blocks_after[number]) for v, rows in groups if number in v.blocks_after]
        self._blocks[0].before = [(rows, v.blocks_after[-1]) for v, rows in groups if -1 in v.blocks_after]

    def run_blocks(self, x: Tensor, positions: Tensor, context: Any) -> Tensor:
        """As the decoder's, kernel by kernel."""
        if not self._are_early_set:
            self._activate(self._early)
            self._are_early_set = True
        return self.decoder.run_blocks(x, positions, context)

    def _activate(self, names: Iterable[str]) -> None:
        for name in names:
            self._sites[name].activate([(rows, v.layers[name]) for v, rows in self._groups if name in v.layers])

    def compiled_blocks(self, layers: Sequence[CachedLayer]) -> CompiledBlocks | None:
        """The blocks for steps that have `updates`; None where they do something that it cannot."""
        config, kernels = self.base.config, self._kernels
        library = None if kernels is None else library_of_blocks()
        described = [block.base.described() if isinstance(block.base, FusedBlock) else None for block in self._blocks]
        if kernels is None or library is None or None in described or config.positions != "learned":
            return None
        base = self.base
        ends = base.token_embedding, base.position_embedding, base.final_norm
        if len({parameter.dtype for module in ends for parameter in module.parameters()}) > 1:
            return None  # torch finds the dtype that all of them go into; the kernels count on one
        return CompiledBlocks(
            library,
            kernels,
            products(),
            described,  # type: ignore[arg-type]
            layers[: len(described)],
            embeddings=(base.token_embedding.weight, base.position_embedding.weight),
            norm=Before(base.final_norm),
            heads=config.num_heads,
        )

    @property
    def updates(self) -> Updates | None:
        """What tells this step's rows apart in the blocks; None where that is more than low-rank updates."""
        if self._updates is None and all(v.low_rank or v.leaves_blocks for v, _ in self._groups):
            self._updates = Updates([(rows, v.low_rank) for v, rows in self._groups if v.low_rank])
        return self._updates

    @property
    def can_end_with_few_rows(self) -> bool:
        """Whether after the last attention all rows are the base's, so that some can be left out."""
        last, norm = self._blocks[-1], self._sites.get("final_norm")
        is_plain = isinstance(last.base, FusedBlock) and last.base.is_plain_after_attention
        return is_plain and not last.after and norm is not None and not norm.is_active

    @torch.no_grad()
    def variant(self, delta: Delta) -> Variant:
        """`delta` over the base, which keeps its weights.

        Raises:
            UserError: it is of another shape, or needs a model of its own, or more extra blocks than the cache holds.
        """
        if needs_own_model(delta):
            raise UserError(
                f"a delta of technique {name_of(delta.method)!r} trains the base's own weights: it cannot share a "
                "batch with it; give it a model and an engine of its own"
            )
        if not self._is_plain:
            raise UserError("the engine's model has a delta applied to it already; deltas go over a plain base")
        check_extent(self.base, delta)
        changed, copy_of = shared_copy(self.base)
        apply_method(changed, delta.method)
        _own_trained(changed)
        load_trained(changed, delta.weights)
        weight = self.base.token_embedding.weight
        changed.to(weight.device, weight.dtype).requires_grad_(False).eval()
        prefix = None if changed.prefix is None else changed.prefix(changed)
        for module in changed.modules():
            if isinstance(module, DoraLinear):
                module.fix()
            if isinstance(module, IntegerLinear):
                module.product = None  # which a prompt was computed with: the engine multiplies by the base's
        variant = Variant(delta.hash)
        order = self._take_blocks(changed, copy_of, variant)
        if differs(changed.final_norm, self.base.final_norm):
            variant.layers["final_norm"] = changed.final_norm
        if prefix is not None:
            variant.prefix = [kv for _, kv in sorted(zip(order, prefix, strict=True), key=lambda pair: pair[0])]
        variant.low_rank = self._low_rank(variant)
        variant.num_bytes = self._own_bytes(variant)
        return variant

    def _low_rank(self, variant: Variant) -> LowRank | None:
        places = [f"blocks.{number}.{name}" for number in range(len(self.base.blocks)) for name in _PRODUCTS]
        in_blocks = {name for name in variant.layers if name.startswith("blocks.")}
        if self._kernels is None or variant.blocks_after or not in_blocks or not in_blocks <= set(places):
            return None
        layers = {name: variant.layers[name] for name in in_blocks}
        if not all(is_low_rank(layer, self.base.get_submodule(name)) for name, layer in layers.items()):
            return None
        return LowRank([layers.get(name) for name in places])

    def _take_blocks(self, changed: Decoder, copy_of: dict[int, nn.Module], variant: Variant) -> list[int]:
        """Put into `variant` what the blocks of `changed` hold; returns the cache's layer of each of them."""
        number_of = {id(copy_of[id(block)]): number for number, block in enumerate(self.base.blocks)}
        order: list[int] = []
        last, num_extra = -1, 0
        for block in cast(Iterable[Block], changed.blocks):
            number = number_of.get(id(block))
            if number is None:
                layer = len(self.base.blocks) + num_extra
                num_extra += 1
                block.attn.layer = layer
                variant.blocks_after.setdefault(last, []).append(block)
                order.append(layer)
                continue
            last = number
            order.append(number)
            for name, base_layer in self.base.blocks[number].named_modules():
                if isinstance(base_layer, _LAYERS):
                    layer_here = block.get_submodule(name)
                    if differs(layer_here, base_layer):
                        variant.layers[f"blocks.{number}.{name}"] = layer_here
        if num_extra > self.num_extra_layers:
            raise UserError(
                f"the delta adds {num_extra} blocks; this engine's cache has room for {self.num_extra_layers}: set "
                f"max_extra_blocks={num_extra}, of a server generator.max_extra_blocks={num_extra}"
            )
        return order

    def _own_bytes(self, variant: Variant) -> int:
        base = {p.data_ptr() for p in [*self.base.parameters(), *self.base.buffers()]}
        modules = [*variant.layers.values(), *(b for blocks in variant.blocks_after.values() for b in blocks)]
        own = {p.data_ptr(): p.nbytes for m in modules for p in [*m.parameters(), *m.buffers()]}
        if self._kernels is not None:  # which take low-rank updates in a form of their own
            layers = variant.layers.items()
            loras = [layer for name, layer in layers if is_low_rank(layer, self.base.get_submodule(name))]
            own |= {factor.data_ptr(): factor.nbytes for layer in loras for factor in lora_factors(layer)}
        prefix = sum(part.nbytes for kv in variant.prefix or () for part in kv)
        return sum(size for pointer, size in own.items() if pointer not in base) + prefix


class Deltas:
    """The loaded ones, by hash; where they take more than `max_bytes`, the least recently used go."""

    def __init__(self, model: MixedModel, *, max_bytes: int | None) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.plain = Variant("", prefix=_prefix_of(model.base))
        self._loaded: OrderedDict[str, Variant] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(variant.num_bytes for variant in list(self._loaded.values()))  # other threads read it too

    @property
    def loaded(self) -> list[str]:
        return list(self._loaded)

    def add(self, variant: Variant, *, pin: bool = False) -> None:
        """
        Raises:
            UserError: it alone is larger than the budget.
            DeltasFull: those that are pinned or in use leave too little of it.
        """
        variant = self._loaded.pop(variant.hash, variant)
        variant.is_pinned = variant.is_pinned or pin
        if self.max_bytes is not None:
            if variant.num_bytes > self.max_bytes:
                raise UserError(
                    f"the delta takes {variant.num_bytes} bytes, more than max_delta_bytes={self.max_bytes}; raise it"
                )
            self._evict(self.max_bytes - variant.num_bytes)
        self._loaded[variant.hash] = variant

    def get(self, delta: str | None) -> Variant:
        """
        Raises:
            UnknownDelta: it is not loaded.
        """
        if delta is None:
            return self.plain
        if delta not in self._loaded:
            raise UnknownDelta(f"delta {delta[:16]!r} is not loaded")
        self._loaded.move_to_end(delta)
        return self._loaded[delta]

    def unpin(self, delta: str) -> None:
        """Nobody asks for it any more: where it is still loaded, it is the next to go."""
        variant = self._loaded.get(delta)
        if variant is not None:
            variant.is_pinned = False
            self._loaded.move_to_end(delta, last=False)

    def _evict(self, max_bytes: int) -> None:
        idle = [v for v in self._loaded.values() if not v.is_pinned and not v.num_requests]
        fixed = self.num_bytes - sum(variant.num_bytes for variant in idle)
        if fixed > max_bytes:
            raise DeltasFull(f"{len(self._loaded) - len(idle)} deltas are pinned or in use and take {fixed} bytes")
        for variant in idle:
            if self.num_bytes <= max_bytes:
                return
            del self._loaded[variant.hash]


def _own_trained(model: Decoder) -> None:
    """Give `model` tensors of its own where it trains the base's."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))


def _through(x: Tensor, parts: Sequence[tuple[slice, list[Block]]], context: Any, rotation: Any) -> Tensor:
    for rows, blocks in parts:
        part = x[:, rows]
        turned = None if rotation is None else tuple(angles[..., rows, :] for angles in rotation)
        for block in blocks:
            part = block(part, context.part(rows), turned)
        x[:, rows] = part
    return x


@torch.inference_mode()
def _prefix_of(model: Decoder) -> list[KeysValues] | None:
    """What the base itself puts before every sequence."""
    return None if model.prefix is None else list(model.prefix(model))
