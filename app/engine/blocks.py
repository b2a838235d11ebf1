"""Who holds which block of the KV cache, and what the blocks that nobody holds still contain. Knows no tensors.

A block has 16 places. Those that are full are named by a key, a hash over all that they follow from: the delta, and
every token up to their end. A sequence that begins like an earlier one takes the earlier one's blocks instead of
computing them again. A block that nobody holds keeps its content until its place is needed, the least recently used
first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_SIZE = 16


def blocks_for(num_places: int) -> int:
    """How many blocks hold so many places."""
    return -(-num_places // BLOCK_SIZE)


def block_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Of the block that holds `tokens` and follows the one with the key `before`, or the delta of that hash."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=before[:64], digest_size=16).digest()


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be taken first

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whatever they contain."""
        return len(self._unheld)

    def take(self) -> int:
        """A block for new content; the caller has looked at `num_free`."""
        block, _ = self._unheld.popitem(last=False)
        self._forget(block)
        self._holders[block] = 1
        return block

    def find(self, key: bytes) -> int | None:
        """Hold the block with this key too, if there is one."""
        block = self._by_key.get(key)
        if block is not None:
            self._unheld.pop(block, None)
            self._holders[block] += 1
        return block

    def name(self, block: int, key: bytes) -> None:
        """`block`, held and full, contains what `key` says. Where another does already, this one stays without."""
        assert self._holders[block], f"nobody holds block {block}"
        if key not in self._by_key:
            self._forget(block)
            self._by_key[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Hold them no longer. The last go first when places are needed: what follows them is of no use without."""
        for block in reversed(blocks):
            assert self._holders[block], f"block {block} was released more often than held"
            self._holders[block] -= 1
            if not self._holders[block]:
                self._unheld[block] = None
                if self._key_of[block] is None:
                    self._unheld.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._by_key[key]
            self._key_of[block] = None
