"""How many generator replicas there should be: a policy for Serve's autoscaler, and what each replica tells it.

A count of requests says little of a language model's load: one may ask for a word, another for a thousand. What is
scarce is the tokens that the engine can compute in a second, and room in its KV cache; what has to wait for either is
counted in seconds of its work.

Serve pickles the module of a policy by value and sends it to its controller, so this one imports nothing but the
standard library: the controller needs no package of ours.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

QUEUED_S = "queued_s"
USE = "use"


class EngineLoad(Protocol):
    """As much of `app.engine.engine.Stats` as is told."""

    @property
    def running(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    @property
    def queued_s(self) -> float: ...
    @property
    def blocks(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def fixed_s(self) -> float: ...
    @property
    def answer_s(self) -> float: ...


def replica_load(engines: Iterable[EngineLoad]) -> dict[str, float]:
    """What a replica reports: the work that waits in all its engines, and the use of the one that is fullest, 0 to 1.

    An engine is as full as the scarcer of two: blocks of its KV cache, and the rate at which a full batch is computed.
    Many short answers take all of the rate and hardly any of the cache.
    """
    queued, use = 0.0, 0.0
    for engine in engines:
        queued += engine.queued_s
        use = max(use, engine_rate(engine), 1 - engine.free_blocks / engine.blocks if engine.blocks else 0.0)
    return {QUEUED_S: queued, USE: use}


def engine_rate(engine: EngineLoad) -> float:
    """Tokens a second that the engine computes just now, over those of a full batch."""
    places = engine.running + engine.free_slots
    return share_of_rate(engine.running, places, fixed_s=engine.fixed_s, answer_s=engine.answer_s)


def share_of_rate(running: int, places: int, *, fixed_s: float, answer_s: float) -> float:
    """Tokens a second over those of a full batch, where a step takes `fixed_s` and for each answer `answer_s`.

    It grows faster than the share of the places: at half of the rate an engine may have but a sixth of them taken. So
    the load of several replicas can be added up: half of the rate of two is what one gives.
    """
    now_s, full_s = fixed_s + answer_s * running, fixed_s + answer_s * places
    return running / places * (full_s / now_s if now_s else 1.0)


class TokenLoad:
    """As many replicas as keep each below `target_use`, and as work off what waits.

    `target_use` is how full an engine is to be, `target_queued_s` how many seconds of a replica's work may wait for
    each: fewer bring help sooner, and more of it than is needed once it is there. A replica goes only if the others
    then stay below their targets by the share `slack`, so that a load at the edge does not start and stop one again and
    again. Smoothing and delays are Serve's own, of the same `autoscaling_config`: `look_back_period_s`,
    `upscale_delay_s`, `downscale_delay_s`, the factors.
    """

    def __init__(self, *, target_queued_s: float = 10.0, target_use: float = 0.9, slack: float = 0.25) -> None:
        """
        Raises:
            ValueError: a target is not positive, or `target_use` or `slack` is no share.
        """
        if not target_queued_s > 0:
            raise ValueError(f"target_queued_s={target_queued_s} must be positive")
        if not 0 < target_use <= 1:
            raise ValueError(f"target_use={target_use} must be above 0, and 1 at most")
        if not 0 <= slack < 1:
            raise ValueError(f"slack={slack} must be at least 0, and below 1")
        self.target_queued_s = target_queued_s
        self.target_use = target_use
        self.slack = slack

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's call, with its `AutoscalingContext`; bounds and delays are applied to the answer."""
        reported: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        if not reported.get(USE):  # nobody has reported yet: what is known is no reason to change anything
            return context.target_num_replicas, {}
        load = self.load(reported[USE].values(), reported.get(QUEUED_S, {}).values())
        return self.replicas(load, there=context.target_num_replicas), {}

    def load(self, use: Iterable[float], queued_s: Iterable[float]) -> float:
        """Of all replicas together, in replicas that are just full enough."""
        return sum(use) / self.target_use + sum(queued_s) / self.target_queued_s

    def replicas(self, load: float, *, there: int) -> int:
        wanted = math.ceil(load)
        if wanted >= there:
            return wanted
        return min(there, math.ceil(load / (1 - self.slack)))
