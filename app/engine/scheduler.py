"""Who waits, who runs: first come, first served, into the cache's free slots. Knows no tensors."""

from collections import OrderedDict

from app.engine.kv_cache import KVCache
from app.engine.sequence import QueueFull, Sequence


class Scheduler:
    """`max_prefill_tokens` bounds the prompt tokens that join in one step, so that running sequences do not stall."""

    def __init__(self, cache: KVCache, *, max_queue: int, max_prefill_tokens: int = 2048) -> None:
        self.cache = cache
        self.max_queue = max_queue
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.running: dict[int, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        """Queue `sequence`.

        Raises:
            QueueFull: `max_queue` sequences wait beyond those that the free slots will take.
        """
        if len(self.waiting) >= self.max_queue + self.cache.num_free:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already (max_queue={self.max_queue})")
        self.waiting[sequence.request_id] = sequence

    def schedule(self) -> list[Sequence]:
        """Admit what fits and return all that run: each computes its uncached tokens in this step."""
        joining = 0  # prompt tokens of this step
        while self.waiting and self.cache.num_free:
            sequence = next(iter(self.waiting.values()))
            if joining and joining + len(sequence.ids) > self.max_prefill_tokens:
                break
            joining += len(sequence.ids)
            del self.waiting[sequence.request_id]
            sequence.slot = self.cache.allocate()
            self.running[sequence.request_id] = sequence
        return list(self.running.values())

    def remove(self, request_id: int) -> bool:
        """Forget a sequence, waiting or running, and free its slot; False if there is none."""
        if self.waiting.pop(request_id, None) is not None:
            return True
        sequence = self.running.pop(request_id, None)
        if sequence is None:
            return False
        assert sequence.slot is not None
        self.cache.free(sequence.slot)
        return True
