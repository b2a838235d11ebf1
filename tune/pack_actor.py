"""Packs as Ray actors: one holds a base, and the trials that train over it. All logic is `PackedRuns`'."""

from typing import Any

import ray

from app.config.schema import TrainConfig


class _PackActor:
    """A thread for each trial that waits here."""

    def __init__(self, config: TrainConfig, *, pass_tokens: int, parent: str | None) -> None:
        from app.training.packed_runs import PackedRuns

        self._runs = PackedRuns(config, pass_tokens=pass_tokens, parent=parent)

    def join(self, name: str, config: TrainConfig) -> dict[str, Any] | None:
        return self._runs.join(name, config)

    def hand_over(self, name: str, config: TrainConfig) -> None:
        self._runs.hand_over(name, config)

    def go_on(self, name: str) -> dict[str, Any] | None:
        return self._runs.go_on(name)

    def present(self, names: list[str]) -> list[str]:
        return self._runs.present(names)

    def leave(self, name: str) -> None:
        self._runs.leave(name)


class Turnstile:
    """Lets as many trials pass at once as the cluster has room for; the others wait here, not for a worker group that
    Ray Train gives up on after a minute."""

    def __init__(self, places: int) -> None:
        import asyncio

        self._places = places
        self._inside: set[int] = set()
        self._changed = asyncio.Condition()

    async def enter(self, number: int) -> None:
        """A trial that is inside passes at once: its process was lost before it could leave, and it begins again."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._inside or len(self._inside) < self._places)
            self._inside.add(number)

    async def leave(self, number: int) -> None:
        """Also of one that is not inside."""
        async with self._changed:
            self._inside.discard(number)
            self._changed.notify_all()


def start_pack(config: TrainConfig, *, size: int, pass_tokens: int, parent: str | None) -> Any:
    """An actor with the base of `config` and the resources of its worker, for `size` trials; its process is started
    anew if it dies, without them."""
    from app.training.trainer import worker_environment

    workers = config.workers
    options = {
        "num_cpus": workers.cpus,
        "num_gpus": workers.gpus,
        "max_concurrency": 2 * size + 2,
        "max_restarts": -1,
        "runtime_env": {"env_vars": worker_environment(workers)},
    }
    return ray.remote(_PackActor).options(**options).remote(config, pass_tokens=pass_tokens, parent=parent)
