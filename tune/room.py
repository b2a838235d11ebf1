"""How much of a sweep the cluster's nodes have room for at once. Knows no Ray: it is told what each node has."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.config.schema import AnyWorkersConfig, TrainConfig
from app.errors import UserError

SPARE_CPUS = 1.0
"""Left to the trials' own processes, which want hardly anything but wait for it, and to what reads their data."""


class Room:
    """What is free, as far as the sweep itself takes it. A process lies on one node."""

    def __init__(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """`nodes` are Ray's resources of each."""
        self._free = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes]
        if self._free:
            max(self._free)[0] -= SPARE_CPUS

    def take(self, workers: AnyWorkersConfig, *, count: int = 1) -> bool:
        """Take what so many `workers` need; nothing where that is not there."""
        before = [list(node) for node in self._free]
        for _ in range(count):
            place = next((node for node in self._free if node[0] >= workers.cpus and node[1] >= workers.gpus), None)
            if place is None:
                self._free = before
                return False
            place[0] -= workers.cpus
            place[1] -= workers.gpus
        return True

    def take_all(self, workers: AnyWorkersConfig, *, count: int, most: int | None) -> int:
        """So often as there is room for, at most `most` times, and once in any case: the sweep would not end else."""
        taken = int(self.take(workers, count=count))
        while taken and (most is None or taken < most) and self.take(workers, count=count):
            taken += 1
        return max(1, taken)


def share_out(
    nodes: Sequence[Mapping[str, float]],
    *,
    packed: Mapping[str, TrainConfig],
    alone: Sequence[TrainConfig],
    most_packs: int | None,
) -> tuple[dict[str, int], int]:
    """How many packs each base in `packed` has, and how many of the runs `alone` go on at once, be each the largest."""
    shares = len(packed) + bool(alone)
    packs: dict[str, int] = {}
    room = Room(nodes)
    for key, trial in packed.items():
        fair = max(1, Room(nodes).take_all(trial.workers, count=1, most=None) // shares)
        most = fair if most_packs is None else min(fair, most_packs)
        packs[key] = room.take_all(trial.workers, count=1, most=most)
    if not alone:
        return packs, 0
    largest = max((trial.workers for trial in alone), key=_size)
    return packs, room.take_all(largest, count=largest.least, most=None)


def check_nodes(nodes: Sequence[Mapping[str, float]], trials: Iterable[TrainConfig]) -> None:
    """Refuse what would wait for ever: nodes that have enough together may each have too little.

    Raises:
        UserError: no node has what a worker of one of `trials` takes.
    """
    for workers in (trial.workers for trial in trials):
        if not any(node.get("CPU", 0.0) >= workers.cpus and node.get("GPU", 0.0) >= workers.gpus for node in nodes):
            present = sorted({f"{node.get('CPU', 0.0):g} and {node.get('GPU', 0.0):g}" for node in nodes})
            raise UserError(
                f"workers.cpus={workers.cpus:g} and workers.gpus={workers.gpus:g}: a worker lies on one node, and none "
                f"has as much (CPUs and GPUs of each: {'; '.join(present)}); lower train.workers.cpus or "
                "train.workers.gpus"
            )


def _size(workers: AnyWorkersConfig) -> tuple[Any, ...]:
    return workers.least * workers.gpus, workers.least * workers.cpus
