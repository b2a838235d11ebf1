"""Where the trials of a population wait for each other: a Ray actor. Who takes over from whom is `population.py`'s."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.config.schema import TrainConfig
from app.config.sweep import PopulationConfig, SweepConfig
from tune.population import Exchange, Takeover, decide, read_exchange, taken_over, write_exchange
from tune.records import TrialRecord, begin_record, read_record
from tune.space import trial_folder

HandOver = Callable[[TrialRecord, TrainConfig, int | None], Awaitable[None]]
"""Begins the run of a configuration where another trial stands, in the pack of that number, or in a run of its own."""
FindLost = Callable[[Mapping[int, int | None]], Awaitable[Sequence[int]]]
"""Of trials, and the pack that each is in, those that their pack does not have: its process was lost."""


@dataclass(eq=False)
class _Visit:
    """A trial that has come to an exchange."""

    pack: int | None
    is_lost: bool = False
    """Its pack has it no more: it is to join again, and then to come anew."""


class Exchanges:
    def __init__(
        self,
        config: SweepConfig,
        hand_over: HandOver,
        *,
        find_lost: FindLost,
        size: int,
        total_steps: int,
        gone: Iterable[int] = (),
    ) -> None:
        """Of `size` trials, which make `total_steps` each, `gone` are over."""
        assert isinstance(config.scheduler, PopulationConfig)
        self._config = config
        self._every = config.scheduler.every
        self._hand_over = hand_over
        self._find_lost = find_lost
        self._size = size
        self._total_steps = total_steps
        self._gone = set(gone)
        self._there: dict[int, dict[int, _Visit]] = {}
        """By step, who has come."""
        self._changed = asyncio.Condition()

    async def enter(self, number: int) -> None:
        """A trial begins, maybe again: wherever it was, it has yet to come there."""
        async with self._changed:
            for there in self._there.values():
                there.pop(number, None)

    async def leave(self, number: int) -> None:
        """It is over: nobody waits for it any more."""
        async with self._changed:
            self._gone.add(number)
            self._changed.notify_all()

    async def meet(self, number: int, step: int, pack: int | None) -> bool:
        """Wait, if there is an exchange after `step`, until it is done; whether the trial is to begin its run anew: it
        has taken over another, or its pack has lost it."""
        if not step or step % self._every or step >= self._total_steps:
            return False
        before = self._record(number).lineage
        async with self._changed:
            there = self._there.setdefault(step, {})
            visit = there[number] = _Visit(pack)
            self._changed.notify_all()
            while not visit.is_lost and not self._is_over(step):
                if len(there.keys() | self._gone) < self._size:
                    await self._changed.wait()
                    continue
                waiting = {each: other.pack for each, other in there.items() if each not in self._gone}
                if lost := await self._find_lost(waiting):
                    for each in lost:
                        there.pop(each).is_lost = True
                else:
                    await self._exchange(step, there)
                self._changed.notify_all()
            return visit.is_lost or self._record(number).lineage != before

    async def _exchange(self, step: int, there: Mapping[int, _Visit]) -> None:
        """Where it was decided before the driver was killed, what is left of it."""
        output = Path(self._config.output)
        exchange = read_exchange(output, step)
        if exchange is None:
            exchange = decide(self._config, [self._record(n) for n in there.keys() - self._gone], step=step)
            write_exchange(output, exchange)
        for takeover in self._left_of(exchange):
            weak, strong = self._record(takeover.weak), self._record(takeover.strong)
            successor = taken_over(self._config, weak, strong, exchange)
            await self._hand_over(strong, successor.config, there[strong.number].pack)
            begin_record(successor)

    def _is_over(self, step: int) -> bool:
        exchange = read_exchange(Path(self._config.output), step)
        return exchange is not None and not self._left_of(exchange)

    def _left_of(self, exchange: Exchange) -> list[Takeover]:
        """What is still to be done."""
        return [
            takeover
            for takeover in exchange.takeovers
            if not {takeover.weak, takeover.strong} & self._gone
            and not self._has_taken_over(takeover.weak, exchange.step)
        ]

    def _has_taken_over(self, number: int, step: int) -> bool:
        """After `step`, or since: who takes over once more has the other's lineage, without its own earlier ones."""
        lineage = self._record(number).lineage
        return bool(lineage) and lineage[-1][1] >= step

    def _record(self, number: int) -> TrialRecord:
        return read_record(trial_folder(self._config, number))


def start_exchanges(
    config: SweepConfig,
    *,
    size: int,
    total_steps: int,
    gone: Iterable[int],
    packs: list[Any],
    with_secrets: Callable[[TrainConfig], TrainConfig],
) -> Any:
    """The actor, for trials in `packs` and in runs of their own."""
    import ray

    async def hand_over(strong: TrialRecord, target: TrainConfig, pack: int | None) -> None:
        target = with_secrets(target)
        if pack is not None:
            await packs[pack].hand_over.remote(str(strong.number), target)
            return
        from app.training.takeover import hand_over as by_checkpoint

        await ray.remote(by_checkpoint).options(num_cpus=0).remote(with_secrets(strong.config), target)

    actor = ray.remote(Exchanges).options(num_cpus=0, max_concurrency=max(1000, 2 * size))
    lost = functools.partial(find_lost, packs)
    return actor.remote(config, hand_over, find_lost=lost, size=size, total_steps=total_steps, gone=gone)


async def find_lost(packs: Sequence[Any], waiting: Mapping[int, int | None]) -> list[int]:
    """As `FindLost`; a run of its own has what it needs in its folder."""
    from ray.exceptions import RayActorError

    lost: list[int] = []
    for pack in {pack for pack in waiting.values() if pack is not None}:
        numbers = [number for number, of in waiting.items() if of == pack]
        try:
            present = await packs[pack].present.remote(list(map(str, numbers)))
        except RayActorError:  # its process is just starting anew, without them
            present = []
        lost += [number for number in numbers if str(number) not in present]
    return lost
