"""The simulation of the serving cluster against theory, against what was measured, and the policy's stability in it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from app.engine.blocks import BLOCK_SIZE
from app.engine.engine import Engine, EngineSettings
from app.engine.sampling import Sampling
from app.models.decoder import GPT2_SIZES, Decoder
from benchmarks.scale import cluster, replica, scenarios
from benchmarks.scale.autoscaler import Autoscaler, shipped
from benchmarks.scale.cluster import Cluster, PathCost, Setup
from benchmarks.scale.profiles import CHAT, SHORT, Profile, cpu, h200_large
from benchmarks.scale.replica import EngineLimits, Replica, Request, StepTime, interpolated

TOKENS, PER_S = 200, 100
EVEN = StepTime(((1, 1 / TOKENS / PER_S),), ((1, 1 / TOKENS / PER_S),), 0.0)
"""A step takes as long for many as for one: each place in the batch is a server of its own, which serves so many a
second."""
ALONE = EngineLimits(max_batch_size=1, max_queue=10**9)


def at_random(random, count):
    """Lengths whose service times are exponential."""
    return np.ones(count, int), random.geometric(1 / TOKENS, count)


def all_alike(random, count):
    return np.ones(count, int), np.full(count, TOKENS)


def mean_answer(setup: Setup, *, load: float, requests: int = 12_000, lengths=at_random) -> float:
    """In service times; `load` requests come in each of them."""
    result = Cluster(setup, lengths=lengths, seed=1).run(lambda _: load * PER_S, requests / load / PER_S)
    return float(result.answer_s.mean()) * PER_S


def test_one_server_at_random_is_mm1() -> None:
    assert mean_answer(Setup(EVEN, ALONE), load=0.5) == pytest.approx(1 / (1 - 0.5), rel=0.05)


def test_one_server_with_equal_work_is_md1() -> None:
    wait = 0.6 / (2 * (1 - 0.6))
    found = mean_answer(Setup(EVEN, ALONE), load=0.6, lengths=all_alike)
    assert found == pytest.approx(1 + wait, rel=0.04)


def test_a_batch_of_eight_is_mm8() -> None:
    load, servers = 6.4, 8
    erlangs = [load**count / math.factorial(count) for count in range(servers)]
    all_busy = load**servers / math.factorial(servers) / (1 - load / servers)
    wait = all_busy / (sum(erlangs) + all_busy) / (servers - load)
    limits = EngineLimits(max_batch_size=servers, max_queue=10**9)
    assert mean_answer(Setup(EVEN, limits), load=load) == pytest.approx(1 + wait, rel=0.04)


@pytest.mark.parametrize(
    ("choices", "expected"), [(1, 1 / (1 - 0.8)), (2, sum(0.8 ** (2**i - 2) for i in range(1, 9)))]
)
def test_the_better_of_two_replicas_is_what_mitzenmacher_says(choices, expected) -> None:
    """His limit for many servers; with one choice each is an M/M/1 of its own."""
    setup = Setup(EVEN, ALONE, replicas=50, choices=choices)
    assert mean_answer(setup, load=0.8 * 50, requests=20_000) == pytest.approx(expected, rel=0.08)


def test_a_proxy_is_a_queue_too_and_the_events_take_their_share() -> None:
    quick = StepTime(((1, 1e-9),), ((1, 1e-9),), 0.0)
    setup = Setup(quick, EngineLimits(max_batch_size=1000), proxy=PathCost(request_s=0.005))
    result = Cluster(setup, lengths=all_alike, seed=1).run(lambda _: 100.0, 120)
    there = 0.005 + 0.5 * 0.005 / (2 * (1 - 0.5))  # an M/D/1 of load one half; and back, behind who came meanwhile
    assert result.first_token_s.mean() == pytest.approx(there * (1 + 0.5), rel=0.06)
    assert result.proxy_use == pytest.approx(0.5, rel=0.05)


def test_what_waits_before_a_path_that_is_too_slow_grows_without_end() -> None:
    setup = Setup(EVEN, EngineLimits(max_batch_size=64), replicas=4, ingress=PathCost(request_s=0.01))
    result = Cluster(setup, lengths=all_alike, seed=1).run(lambda _: 200.0, 5)
    # Twice what it can: what comes at t is on its way at 2 t, and its answer, behind what came since, at 4 t.
    assert result.answered / result.arrived == pytest.approx(1 / 4, rel=0.08)
    assert result.ingress_use > 0.99


def test_every_request_is_answered_refused_or_in_flight() -> None:
    setup = scenarios.of(cpu(), replicas=3, proxy=PathCost(0.002, 0.0005), ingress=PathCost(0.004, 0.001), ingresses=2)
    autoscaler = Autoscaler(shipped(max_replicas=5), replicas=3)
    run = Cluster(replace(setup, autoscaler=autoscaler), lengths=CHAT, seed=3)
    result = run.run(lambda t: 60.0 if t < 90 else 1.0, 500)
    inside = sum(each.ongoing for each in run._replicas)
    assert result.refused > 0 and result.arrived == result.answered + result.refused + result.in_flight
    assert inside <= result.in_flight <= inside + 3, "the others are on their way"
    assert result.first_token_s.min() > 0 and len(result.answer_s) == result.answered


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int):
        return Cluster(scenarios.of(cpu(), replicas=3), lengths=SHORT, seed=seed).run(lambda _: 30.0, 30)

    one, again, other = run(0), run(0), run(1)
    assert np.array_equal(one.first_token_s, again.first_token_s) and one.series == again.series
    assert not np.array_equal(one.first_token_s[:50], other.first_token_s[:50])


def test_steps_are_those_of_the_engine() -> None:
    """How many rows each step computes and how many tokens it gives, where prompts are read in pieces and many wait."""
    limits = EngineLimits(max_batch_size=8, max_queue=100, max_step_tokens=32)
    random = np.random.default_rng(0)
    sizes = [(int(p), int(n)) for p, n in zip(random.integers(1, 60, 40), random.integers(1, 12, 40), strict=True)]
    steps = engine_steps(sizes, limits)
    assert simulated_steps(sizes, limits) == steps
    assert max(rows for rows, _ in steps) == 32 and len({rows for rows, _ in steps}) > 5


def engine_steps(sizes: list[tuple[int, int]], limits: EngineLimits) -> list[tuple[int, int]]:
    """(rows, tokens) of each step. The first request begins alone, as in an idle server; the others join."""
    settings = {name: value for name, value in vars(limits).items() if name != "gather_s"}
    shape = replace(
        GPT2_SIZES["gpt2"], vocab_size=64, context_length=128, num_layers=1, num_heads=1, width=8, mlp_width=8
    )
    model = Decoder(shape)
    model.initialize(generator=torch.Generator().manual_seed(0))
    engine = Engine(model, EngineSettings(**settings, kernels="torch", reuse_prefixes=False))
    draw, found = np.random.default_rng(1), []
    waiting = [(draw.integers(64, size=prompt).tolist(), Sampling(max_tokens=new)) for prompt, new in sizes]
    engine.add_request(*waiting.pop(0))
    while engine.has_work:
        before = engine.stats().computed_tokens
        events = engine.step()
        found.append((engine.stats().computed_tokens - before, len(events)))
        while waiting:
            engine.add_request(*waiting.pop(0))
    return found


def simulated_steps(sizes: list[tuple[int, int]], limits: EngineLimits) -> list[tuple[int, int]]:
    """The same, read from times: a step takes a second, and a thousandth for each row."""
    line = ((0, 1.0), (1, 1.001))
    subject, found, before, at = Replica(StepTime(line, line, 0.001), limits), [], 0.0, None
    for prompt, new in sizes:
        at = subject.add(Request(prompt, new, 0.0), 0.0) or at
    while at is not None:
        now, steps, tokens = at, subject.steps, subject.tokens
        at = subject.advance(now)[2]
        count = subject.steps - steps
        found += [(round(((now - before) / count - 1) * 1000), (subject.tokens - tokens) // count)] * count
        before = now
    return found


def test_the_constants_of_the_engine_and_the_application_are_theirs() -> None:
    from app.serving import application, model_library

    assert replica.BLOCK_SIZE == BLOCK_SIZE
    assert cluster.BATCHES_PER_S == model_library._BATCHES_PER_S
    assert cluster.MAX_ONGOING == cluster.MAX_QUEUED == application._MAX_ONGOING
    assert EngineLimits().max_step_tokens == EngineSettings().max_step_tokens


def test_a_table_of_times_is_read_between_its_points() -> None:
    assert interpolated(((1, 2.0), (3, 4.0)), 2) == 3.0
    assert interpolated(((1, 2.0), (3, 4.0)), 5) == 6.0
    assert interpolated(((1, 2.0), (3, 4.0)), 0) == 1.0


@pytest.mark.parametrize(
    "row", [*scenarios.validation()["batches"], *scenarios.validation()["served"]], ids=lambda row: row["name"]
)
def test_the_simulation_comes_near_what_was_measured(row) -> None:
    assert abs(row["error"]) < 0.16


def test_a_crowd_gets_replicas_and_the_policy_changes_its_mind_once() -> None:
    # Fixed, so that the next record of `generation.json` does not decide whether the policy is sound.
    line, a_row = ((0, 0.0111), (1, 0.0117)), 0.0006
    profile = replace(cpu(), step_time=StepTime(line, line, a_row))
    base = 2 * 0.7 * scenarios.capacity(profile, SHORT)
    config = shipped(max_replicas=40)
    setup = scenarios.of(profile, replicas=2, autoscaler=Autoscaler(config, replicas=2))

    def rate(t: float) -> float:
        return base * (5 if 60 <= t < 240 else 1)

    result = Cluster(setup, lengths=SHORT, seed=0).run(rate, 900)
    targets = [row[1] for row in result.series]
    assert max(targets[:60]) == 2 and max(targets[60:240]) >= 7, "five times the load of 1.4 replicas"
    assert scenarios.turns(targets) == 1 and targets[-1] <= 3
    assert result.refused < 0.05 * result.arrived
    assert result.quantile(0.99, since=200, until=240) < result.quantile(0.99, since=100, until=140)


@pytest.mark.parametrize("profile", [cpu(), h200_large()], ids=lambda profile: profile.name)
@pytest.mark.parametrize("load", [0.6, 1.0, 1.4, 2.2])
def test_a_steady_load_does_not_start_and_stop_replicas(profile: Profile, load: float) -> None:
    rate = scenarios.steady(load * scenarios.capacity(profile, SHORT))
    setup = scenarios.of(profile, replicas=1, autoscaler=Autoscaler(shipped(max_replicas=10), replicas=1))
    targets = [row[1] for row in Cluster(setup, lengths=SHORT, seed=0).run(rate, 1800).series]
    assert targets[-1] >= load and scenarios.turns(targets[300:]) == 0, targets[::60]
