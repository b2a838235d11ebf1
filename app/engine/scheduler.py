"""Who waits, who runs, and what each step computes. Knows no tensors.

Those that generate come first, with one token each; the rest of a step's budget goes to prompts, in pieces where they
are long, so that nobody's next token waits for a whole one. Where blocks run out, the
running sequence of the last rank gives up its own and waits again; what it has computed stays to be found for as long
as nobody needs the place. The first in rank never gives up anything, and every request fits into the cache alone, so
there is always one that goes on.
"""

from bisect import insort

from app.engine.events import QueueFull
from app.engine.kv_cache import KVCache
from app.engine.sequence import Sequence


class Scheduler:
    def __init__(
        self,
        cache: KVCache,
        *,
        max_batch_size: int,
        max_queue: int,
        max_queued_tokens: int | None,
        max_step_tokens: int,
    ) -> None:
        self.cache = cache
        self.max_batch_size = max_batch_size
        self.max_queue = max_queue
        self.max_queued_tokens = max_queued_tokens
        self.max_step_tokens = max_step_tokens
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # by rank
        self.queued_tokens = 0
        """Prompt and answer tokens that those who wait may still take."""
        self.num_preemptions = 0

    @property
    def free_slots(self) -> int:
        return self.max_batch_size - len(self.running)

    def check_room(self, num_sequences: int, max_length: int) -> None:
        """For `num_sequences` of `max_length` tokens each.

        Raises:
            QueueFull: as many sequences or tokens wait as may, beyond those that the free slots will take.
        """
        num_waiting, slots = len(self.waiting), self.free_slots
        if num_waiting + num_sequences > self.max_queue + slots:
            raise QueueFull(f"{num_waiting} requests are waiting already (max_queue={self.max_queue})")
        limit = self.max_queued_tokens
        if limit is None or num_waiting <= slots:  # those who would be the first to wait may be of any length
            return
        queued = self.queued_tokens - sum(sequence.max_length for sequence in self.waiting[:slots])
        if queued + num_sequences * max_length > limit:
            raise QueueFull(f"{queued} tokens are waiting already (max_queued_tokens={limit})")

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)
        self.queued_tokens += sequence.max_length

    def schedule(self) -> list[Sequence]:
        """Those that compute something in this step; `num_scheduled` tells how many tokens."""
        budget = self.max_step_tokens
        scheduled: list[Sequence] = []
        decoding = [sequence for sequence in self.running if sequence.num_cached + 1 == len(sequence.ids)]
        reading = [sequence for sequence in self.running if sequence.num_cached + 1 < len(sequence.ids)]
        for sequence in [*decoding, *reading]:
            if sequence.blocks:  # else it has given them up to one before it
                budget -= self._schedule_running(sequence, budget, scheduled)
        self._admit(budget, scheduled)
        return scheduled

    def remove(self, sequence: Sequence) -> None:
        """Forget `sequence`, waiting or running, and release its blocks."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            self.queued_tokens -= sequence.max_length
        else:
            self.running.remove(sequence)
            self.cache.release(sequence)

    def _schedule_running(self, sequence: Sequence, budget: int, scheduled: list[Sequence]) -> int:
        wanted = min(len(sequence.ids) - sequence.num_cached, budget)
        if wanted <= 0:
            return 0
        while not self.cache.reserve(sequence, sequence.num_cached + wanted):
            if self._preempt_last(scheduled) is sequence:
                return 0
        sequence.num_scheduled = wanted
        scheduled.append(sequence)
        return wanted

    def _admit(self, budget: int, scheduled: list[Sequence]) -> None:
        """The first in rank among those that wait, for as long as there is room for whole prompts."""
        for sequence in list(self.waiting):
            if budget <= 0:
                return
            if self._waits_for_leader(sequence):
                continue  # it will find the prompt's blocks in a later step
            if not self._make_room(sequence, scheduled):
                return
            self.waiting.remove(sequence)
            self.queued_tokens -= sequence.max_length
            insort(self.running, sequence, key=_rank)
            sequence.num_scheduled = min(len(sequence.ids) - sequence.num_cached, budget)
            budget -= sequence.num_scheduled
            scheduled.append(sequence)

    def _make_room(self, sequence: Sequence, scheduled: list[Sequence]) -> bool:
        """A slot and blocks for `sequence`, if need be at the cost of those of lower priority."""
        while not (self.free_slots > 0 and self.cache.begin(sequence)):
            if not self.running or self.running[-1].rank[0] <= sequence.rank[0]:
                return False
            self._preempt_last(scheduled)
        return True

    def _preempt_last(self, scheduled: list[Sequence]) -> Sequence:
        """Have the running sequence of the last rank wait again, and out of this step if it was in it."""
        last = self.running.pop()
        if last in scheduled:
            scheduled.remove(last)
        self.cache.release(last)
        self.add(last)
        self.num_preemptions += 1
        return last

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        leader = sequence.leader
        if leader is None or leader.has_computed_prompt:
            return False
        return leader in self.running or leader in self.waiting


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
