"""How many generator replicas there should be: a policy for Serve's autoscaler, and what each replica tells it.

A count of requests says little of a language model's load: one may ask for a word, another for a thousand. What is
scarce is room in the engine's batch and in its KV cache, and what has to wait for it is counted in tokens.

Serve pickles the module of a policy by value and sends it to its controller, so this one imports nothing but the
standard library: the controller needs no package of ours.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

QUEUED_TOKENS = "queued_tokens"
USE = "use"


class EngineLoad(Protocol):
    """As much of `app.engine.engine.Stats` as is told."""

    @property
    def running(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    @property
    def queued_tokens(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...


def replica_load(engines: Iterable[EngineLoad]) -> dict[str, float]:
    """What a replica reports: tokens that wait in all its engines, and the use of the one that is fullest, 0 to 1.

    An engine is as full as the scarcer of two: blocks of its KV cache, and places in its batch. Many short answers fill
    the batch and hardly any of the cache.
    """
    queued, use = 0, 0.0
    for engine in engines:
        queued += engine.queued_tokens
        places = engine.running + engine.free_slots
        use = max(use, engine.running / places, 1 - engine.free_blocks / engine.blocks if engine.blocks else 0.0)
    return {QUEUED_TOKENS: float(queued), USE: use}


class TokenLoad:
    """As many replicas as keep each below `target_use`, and as work off what waits.

    `target_use` is how full an engine is to be, `target_queued_tokens` how many waiting tokens are worth one more
    replica. A replica goes only if the others then stay below their targets by the share `slack`, so that a load at the
    edge does not start and stop one again and again. Smoothing and delays are Serve's own, of the same
    `autoscaling_config`: `look_back_period_s`, `upscale_delay_s`, `downscale_delay_s`, the factors.
    """

    def __init__(self, *, target_queued_tokens: float = 8192.0, target_use: float = 0.8, slack: float = 0.25) -> None:
        """
        Raises:
            ValueError: a target is not positive, or `target_use` or `slack` is no share.
        """
        if not target_queued_tokens > 0:
            raise ValueError(f"target_queued_tokens={target_queued_tokens} must be positive")
        if not 0 < target_use <= 1:
            raise ValueError(f"target_use={target_use} must be above 0, and 1 at most")
        if not 0 <= slack < 1:
            raise ValueError(f"slack={slack} must be at least 0, and below 1")
        self.target_queued_tokens = target_queued_tokens
        self.target_use = target_use
        self.slack = slack

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's call, with its `AutoscalingContext`; bounds and delays are applied to the answer."""
        reported: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        if not reported.get(USE):  # nobody has reported yet: what is known is no reason to change anything
            return context.target_num_replicas, {}
        load = self.load(reported[USE].values(), reported.get(QUEUED_TOKENS, {}).values())
        return self.replicas(load, there=context.target_num_replicas), {}

    def load(self, use: Iterable[float], queued_tokens: Iterable[float]) -> float:
        """Of all replicas together, in replicas that are just full enough."""
        return sum(use) / self.target_use + sum(queued_tokens) / self.target_queued_tokens

    def replicas(self, load: float, *, there: int) -> int:
        wanted = math.ceil(load)
        if wanted >= there:
            return wanted
        return min(there, math.ceil(load / (1 - self.slack)))
