"""Keys and values of all running sequences, in blocks of 16 places. Knows tensors and blocks, no queues or sampling."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.engine.blocks import BLOCK_SIZE, BlockPool, block_key, blocks_for
from app.engine.kernels import CachedLayer
from app.engine.sequence import Sequence
from app.models.decoder import DecoderConfig


class KVCache:
    """`keys` [layers, blocks, kv_heads, head_width, 16], transposed, as products with a query read them best;
    `values` [layers, blocks, kv_heads, 16, head_width]. `layers` are these one by one.

    In int8 keys are [layers, blocks, kv_heads, head_width / 4, 16, 4], values [layers, blocks, kv_heads, 4, head_width,
    4], and there are steps: each key and value of a head is rounded by itself.

    `num_extra_layers` are those of extra blocks; pages of memory that no delta uses are never touched.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_blocks: int,
        num_extra_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        reuse: bool,
        prefault: bool = False,
    ) -> None:
        layers = config.num_layers + num_extra_layers
        shape = (layers, num_blocks, config.kv_heads)
        of_keys: tuple[int, ...] = (config.head_width, BLOCK_SIZE)
        of_values: tuple[int, ...] = (BLOCK_SIZE, config.head_width)
        if dtype == torch.int8:
            of_keys, of_values = (config.head_width // 4, BLOCK_SIZE, 4), (BLOCK_SIZE // 4, config.head_width, 4)
        self.keys = _zeros((*shape, *of_keys), dtype, device)
        self.values = _zeros((*shape, *of_values), dtype, device)
        steps: list[Any] = [[None] * layers] * 2
        if dtype == torch.int8:
            steps = [_zeros((*shape, BLOCK_SIZE), torch.float32, device) for _ in range(2)]
        if prefault:
            for part in (self.keys, self.values, *steps):
                if isinstance(part, Tensor):
                    part[: config.num_layers].zero_()
        self.layers = [CachedLayer(*parts) for parts in zip(self.keys, self.values, *steps, strict=True)]
        self.pool = BlockPool(num_blocks)
        self.reuse = reuse
        self.num_reused_tokens = 0

    @staticmethod
    def block_bytes(config: DecoderConfig, *, num_extra_layers: int, dtype: torch.dtype) -> int:
        layers = config.num_layers + num_extra_layers
        steps = 4 if dtype == torch.int8 else 0
        return 2 * layers * config.kv_heads * BLOCK_SIZE * (config.head_width * dtype.itemsize + steps)

    def begin(self, sequence: Sequence) -> bool:
        """Blocks for a sequence's prompt and its prefix, as far as they are there already with their content; False
        where there are not enough."""
        found = self._find(sequence)
        missing = _num_blocks(sequence, len(sequence.ids)) - len(found)
        if missing > self.pool.num_free:
            self.pool.release(found)
            return False
        sequence.blocks = found + [self.pool.take() for _ in range(missing)]
        sequence.num_cached = max(0, len(found) * BLOCK_SIZE - sequence.variant.prefix_length)
        self.num_reused_tokens += sequence.num_cached
        self._fill_prefix(sequence, first=len(found) * BLOCK_SIZE)
        return True

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens` of a running sequence; False where there are not enough."""
        missing = _num_blocks(sequence, num_tokens) - len(sequence.blocks)
        if missing > self.pool.num_free:
            return False
        sequence.blocks += [self.pool.take() for _ in range(missing)]
        return True

    def computed(self, sequence: Sequence) -> None:
        """The step has filled the places of the sequence's scheduled tokens."""
        sequence.num_cached += sequence.num_scheduled
        sequence.num_scheduled = 0
        self._name_full(sequence, sequence.variant.prefix_length + sequence.num_cached)

    def release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.block_keys = [], []
        sequence.num_cached = sequence.num_scheduled = 0

    def _find(self, sequence: Sequence) -> list[int]:
        """Blocks with the sequence's beginning, held; at least one token is left to compute."""
        if not self.reuse:
            return []
        found: list[int] = []
        sequence.block_keys = []
        while (len(found) + 1) * BLOCK_SIZE - sequence.variant.prefix_length < len(sequence.ids):
            key = _key(sequence, len(found))
            block = self.pool.find(key)
            if block is None:
                break
            found.append(block)
            sequence.block_keys.append(key)
        return found

    def _fill_prefix(self, sequence: Sequence, *, first: int) -> None:
        """Copy the variant's own keys and values from place `first` on into the sequence's blocks."""
        variant = sequence.variant
        if first >= variant.prefix_length:
            return
        assert variant.prefix is not None
        places = torch.arange(first, variant.prefix_length, device=self.keys.device)
        blocks = torch.tensor(sequence.blocks, device=places.device)[places // BLOCK_SIZE]
        for layer, (keys, values) in enumerate(variant.prefix):  # each [kv_heads, prefix_length, head_width]
            self.write(layer, blocks, places % BLOCK_SIZE, *(kv[:, first:].transpose(0, 1) for kv in (keys, values)))
        self._name_full(sequence, variant.prefix_length)

    def _name_full(self, sequence: Sequence, num_places: int) -> None:
        """Have the blocks be found that the sequence's first `num_places` places fill."""
        if self.reuse:
            for number in range(len(sequence.block_keys), num_places // BLOCK_SIZE):
                key = _key(sequence, number)
                sequence.block_keys.append(key)
                self.pool.name(sequence.blocks[number], key)

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put `keys` and `values` [rows, kv_heads, head_width] in their places."""
        cached = self.layers[layer]
        if cached.key_steps is not None and cached.value_steps is not None:
            keys, cached.key_steps[blocks, :, offsets] = _rounded(keys)
            values, cached.value_steps[blocks, :, offsets] = _rounded(values)
            cached.keys[blocks, :, :, offsets] = keys.unflatten(-1, (-1, 4)).to(torch.int8)
            cached.values[blocks, :, offsets // 4, :, offsets % 4] = values.to(torch.int8)
        else:
            cached.keys[blocks, :, :, offsets] = keys.to(self.keys.dtype)
            cached.values[blocks, :, offsets] = values.to(self.values.dtype)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [rows, kv_heads, head_width] as multiples from -127 to 127 of steps [rows, kv_heads], and these."""
    x = x.float()
    steps = x.abs().amax(dim=-1).clamp(min=1e-12) / 127
    return (x / steps.unsqueeze(-1)).round(), steps


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` there; the host does not wait until it is."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because a masked product still multiplies what stands in unused places. On a CPU memory is taken page by
    page, as it is first written to, where torch.zeros would take it all at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    same_size = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, same_size)).view(dtype)


def _num_blocks(sequence: Sequence, num_tokens: int) -> int:
    return blocks_for(sequence.variant.prefix_length + num_tokens)


def _key(sequence: Sequence, number: int) -> bytes:
    """Of the sequence's block `number`; those before it have theirs."""
    before = sequence.block_keys[number - 1] if number else sequence.variant.root_key
    first = number * BLOCK_SIZE - sequence.variant.prefix_length
    return block_key(before, sequence.ids[max(0, first) : max(0, first + BLOCK_SIZE)])
