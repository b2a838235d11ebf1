"""The autoscaling policy alone, and over hours of simulated load with the shipped settings and Serve's own delays."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig

from app.serving.autoscaling import QUEUED_S, USE, TokenLoad, replica_load, share_of_rate

REPOSITORY = Path(__file__).parents[2]
RATE = 700.0
"""Tokens a second that one replica computes at most."""
LATENCY_S = 10.0
"""An answer takes, while the engine is not full."""
ROOM = RATE * LATENCY_S
"""Tokens in work with which an engine is full; what comes beyond them waits."""
START_S = 20
"""A new replica needs to load its model."""


def engine(**values: float) -> SimpleNamespace:
    idle = {"running": 0, "free_slots": 8, "queued_s": 0.0, "blocks": 100, "free_blocks": 100}
    return SimpleNamespace(**idle | {"fixed_s": 0.0, "answer_s": 0.0} | values)


def context(replicas: dict[str, tuple[float, float]], *, there: int) -> SimpleNamespace:
    """Of (use, queued seconds) by replica."""
    return SimpleNamespace(
        target_num_replicas=there,
        aggregated_metrics={
            USE: {name: use for name, (use, _) in replicas.items()},
            QUEUED_S: {name: queued for name, (_, queued) in replicas.items()},
        },
    )


def test_a_replica_reports_its_fullest_engine_and_all_that_waits() -> None:
    assert replica_load([engine()]) == {QUEUED_S: 0, USE: 0}
    full_batch = engine(running=6, free_slots=2, free_blocks=90, queued_s=1.5)
    full_cache = engine(running=1, free_slots=7, free_blocks=5, queued_s=3.0)
    assert replica_load([full_batch]) == {QUEUED_S: 1.5, USE: 0.75}
    assert replica_load([full_batch, full_cache]) == {QUEUED_S: 4.5, USE: 0.95}
    half_of_the_rate = engine(running=2, free_slots=6, fixed_s=4e-3, answer_s=1e-3)  # 2 in 6 ms; 8 in 12
    assert replica_load([half_of_the_rate]) == {QUEUED_S: 0, USE: pytest.approx(0.5)}


def test_a_share_of_the_rate_is_that_of_the_places_only_where_a_step_costs_the_same_for_all() -> None:
    assert share_of_rate(0, 8, fixed_s=1.0, answer_s=1.0) == 0
    assert share_of_rate(8, 8, fixed_s=1.0, answer_s=1.0) == 1
    assert share_of_rate(2, 8, fixed_s=1.0, answer_s=0.0) == 0.25
    assert share_of_rate(2, 8, fixed_s=0.0, answer_s=1.0) == 1, "one after the other they would be as fast"
    assert share_of_rate(2, 8, fixed_s=0.0, answer_s=0.0) == 0.25, "no step yet"


@pytest.mark.parametrize(
    ("replicas", "there", "wanted"),
    [
        ({"a": (0.0, 0)}, 1, 0),  # idle: Serve raises it to min_replicas
        ({"a": (0.0, 0), "b": (0.0, 0)}, 2, 0),
        ({"a": (0.5, 0)}, 1, 1),
        ({"a": (1.0, 0)}, 1, 2),  # full, and nobody waits yet
        ({"a": (1.0, 30)}, 1, 5),  # a crowd
        ({"a": (0.8, 0), "b": (0.8, 0)}, 2, 2),
        ({"a": (0.4, 0), "b": (0.36, 0)}, 2, 2),  # one would do, and be too full to stay alone
        ({"a": (0.3, 0), "b": (0.2, 0)}, 2, 1),
        ({"a": (1.0, 5)}, 2, 2),  # the second one is starting
        ({}, 3, 3),  # none has reported yet
    ],
)
def test_replicas_follow_use_and_what_waits(replicas, there, wanted) -> None:
    policy = TokenLoad(target_queued_s=10, target_use=0.8, slack=0.25)
    assert policy(context(replicas, there=there)) == (wanted, {})


def test_more_load_never_wants_fewer_replicas() -> None:
    policy = TokenLoad()
    for there in range(1, 6):
        wanted = [policy.replicas(load / 20, there=there) for load in range(200)]
        assert wanted == sorted(wanted)


@pytest.mark.parametrize("values", [{"target_queued_s": 0}, {"target_use": 1.5}, {"slack": 1}, {"slack": -1}])
def test_a_target_that_makes_no_sense_is_refused(values) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        TokenLoad(**values)


@dataclass
class Replica:
    ready_at: float
    tokens: float = 0.0
    """In work and waiting."""
    use: deque = field(default_factory=deque)
    queued: deque = field(default_factory=deque)

    def step(self, look_back_s: int) -> None:
        queued_s = max(0.0, self.tokens - ROOM) / RATE
        for series, value in ((self.use, min(1.0, self.tokens / ROOM)), (self.queued, queued_s)):
            series.append(value)
            while len(series) > look_back_s:
                series.popleft()
        self.tokens -= min(RATE, self.tokens / LATENCY_S)


@pytest.fixture
def simulate(monkeypatch) -> Callable[..., list[int]]:
    """`simulate(arrivals, seconds=…, replicas=…)`: how many replicas there are in each second, where `arrivals(t)`
    tokens come in second t, with the settings of serve_config.yaml."""
    values = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())["applications"][0]["deployments"]
    (settings,) = [deployment["autoscaling_config"] for deployment in values if deployment["name"] == "generator"]
    config = AutoscalingConfig(**settings)
    policy = autoscaling_policy._apply_autoscaling_config(TokenLoad(**config.policy.policy_kwargs).__call__)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(autoscaling_policy, "time", SimpleNamespace(time=lambda: clock.now))

    def run(arrivals: Callable[[float], float], *, seconds: int, replicas: int = 1) -> list[int]:
        there = [Replica(ready_at=0) for _ in range(replicas)]
        state: dict = {}
        counts = []
        for second in range(seconds):
            clock.now = float(second)
            ready = [replica for replica in there if replica.ready_at <= second]
            min(ready, key=lambda replica: replica.tokens).tokens += arrivals(second)
            for replica in ready:
                replica.step(int(config.look_back_period_s))
            mean = {
                str(number): (sum(r.use) / len(r.use), sum(r.queued) / len(r.queued)) for number, r in enumerate(ready)
            }
            now = context(mean, there=len(there))
            now.current_num_replicas, now.total_num_requests = len(ready), 0.0
            now.policy_state, now.config = state, config
            wanted, state = policy(now)
            wanted = max(config.min_replicas, min(config.max_replicas, wanted))
            there = there[:wanted] + [Replica(ready_at=second + START_S) for _ in range(wanted - len(there))]
            counts.append(wanted)
        return counts

    return run


def changes(counts: list[int]) -> list[int]:
    """The seconds in which it changed."""
    return [second for second in range(1, len(counts)) if counts[second] != counts[second - 1]]


def test_an_idle_server_goes_down_to_its_least_one_at_a_time(simulate) -> None:
    counts = simulate(lambda t: 0.0, seconds=1000, replicas=4)
    assert counts[-1] == 1 and sorted(counts, reverse=True) == counts
    downs = changes(counts)
    assert [counts[second] for second in downs] == [3, 2, 1] or [counts[second] for second in downs] == [2, 1]
    assert downs[0] >= 119 and all(later - earlier >= 119 for earlier, later in zip(downs, downs[1:], strict=False))


def test_a_flash_crowd_gets_replicas_within_a_minute(simulate) -> None:
    counts = simulate(lambda t: 2000.0 if t >= 100 else 50.0, seconds=400)
    assert set(counts[:100]) == {1}
    assert counts[140] >= 3, "2,000 tokens a second are three replicas' work"
    assert counts[-1] == 4


def test_an_engine_that_is_full_gets_company_although_nobody_waits(simulate) -> None:
    counts = simulate(lambda t: 0.95 * RATE, seconds=300)
    assert counts[-1] == 2 and len(changes(counts)) == 1


@pytest.mark.parametrize("load", [0.5, 0.8, 0.85, 1.2, 1.6, 2.0, 2.4])
def test_a_steady_load_that_wavers_does_not_start_and_stop_replicas(simulate, load) -> None:
    counts = simulate(lambda t: load * RATE * (1 + 0.1 * math.sin(t / 40)), seconds=7200)
    assert max(changes(counts), default=0) < 600, "it has settled"
    assert counts[-1] >= load


def test_after_the_crowd_it_goes_down_slowly(simulate) -> None:
    counts = simulate(lambda t: 2000.0 if t < 600 else 50.0, seconds=1800)
    assert max(counts) == 4 and counts[-1] == 1
    assert min(counts[600:700]) >= 3, "a lull of a minute is none"
