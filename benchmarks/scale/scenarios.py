"""What is asked of the simulation. Each scenario returns what goes into the report; a run is decided by `SEED`."""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from benchmarks.generation.workloads import workload
from benchmarks.scale.autoscaler import Autoscaler, shipped
from benchmarks.scale.cluster import Cluster, PathCost, Rate, Result, Setup
from benchmarks.scale.profiles import (
    CHAT,
    SHORT,
    Profile,
    Uniform,
    batch_run,
    cpu,
    h200,
    h200_large,
    limiter_request_s,
    path_costs,
    recorded,
)
from benchmarks.scale.replica import EngineLimits

SEED = 0
SIZES = (1, 3, 10, 30, 100, 300, 1000)
LOAD = 0.75
"""Of what the replicas can do."""
DAY_S = 86_400.0
PATH_USE = 0.6
"""How busy proxies and ingresses may be where there are to be enough."""


def of(profile: Profile, **changes: Any) -> Setup:
    return replace(Setup(profile.step_time, profile.limits, start_s=profile.start_s), **changes)


@cache
def capacity(profile: Profile, lengths: Uniform) -> float:
    """Requests a second that one replica can answer: twice as many clients as its batch has places, and a free path."""
    clients = 2 * profile.limits.max_batch_size
    most = 12 * clients
    first = Cluster(of(profile), lengths=lengths, seed=SEED).run_closed(clients, math.inf, requests=clients * 2)
    result = Cluster(of(profile), lengths=lengths, seed=SEED).run_closed(clients, math.inf, requests=most)
    return (result.answered - first.answered) / (result.seconds - first.seconds)


@cache
def streams(profile: Profile, lengths: Uniform) -> tuple[float, float]:
    """(events between the first and the last of each, seconds that each is open), at `LOAD`."""
    rate = LOAD * capacity(profile, lengths)
    result = Cluster(of(profile, replicas=3), lengths=lengths, seed=SEED).run(steady(3 * rate), 3000 / rate)
    return result.events / result.arrived, float(result.answer_s.mean())


# --- against what was measured ---


def validation() -> dict[str, Any]:
    return {"batches": [_batch("cpu"), _batch("h200")], "served": _served()}


def _batch(kind: str) -> dict[str, Any]:
    """A batch that the constants were not taken from."""
    if kind == "cpu":
        name, profile = "W3 on two CPU cores", cpu()
        runs = recorded("generation")["runs"]["W3"]["pacos_bf16"]
        measured = statistics.median(run["tokens"] / run["seconds"] for run in runs)
        requests, limits = workload("W3"), EngineLimits(max_batch_size=128, max_queue=1000)
    else:
        name, profile = "W2 on an H200", h200()
        measured = recorded("gpu-generation")["results"]["bf16"]["W2"]["tokens_per_s"]
        requests, limits = workload("W2"), EngineLimits(max_batch_size=64, max_step_tokens=4096)
    seconds, _, _ = batch_run([(len(r.ids), r.new_tokens) for r in requests], profile.step_time, limits)
    return compared(name, "tokens/s", sum(r.new_tokens for r in requests) / seconds, measured)


def _served() -> list[dict[str, Any]]:
    """500 clients of `pacos serve` (serving.json). The served rate is taken from the record, for there all of it shares
    two cores; what is simulated is how long who waits."""
    record = recorded("serving")
    pacos, tokens = record["parts"]["pacos"], record["tokens"]
    batch = 128
    profile = cpu()
    # all batches full: the time of a step follows from the rate, and prompts are in it
    step_s = batch / pacos["tokens_per_s"]
    flat = replace(profile.step_time, decoding=((1, step_s),), reading=((1, step_s),), prompt_token_s=0.0)
    setup = Setup(flat, EngineLimits(max_batch_size=batch, max_queue=512))
    lengths = Uniform((64, 64), (tokens, tokens))
    result = Cluster(setup, lengths=lengths, seed=SEED).run_closed(
        record["clients"], math.inf, requests=record["requests"]
    )
    rows = [compared("500 clients", "tokens/s", result.tokens / result.seconds, pacos["tokens_per_s"])]
    for name in ("p50", "p90", "p99"):
        share = int(name[1:]) / 100
        rows.append(compared(f"first token, {name}", "s", result.quantile(share), pacos["first_token_s"][name]))
        rows.append(
            compared(f"whole answer, {name}", "s", float(np.quantile(result.answer_s, share)), pacos["request_s"][name])
        )
    return rows


def compared(name: str, unit: str, simulated: float, measured: float) -> dict[str, Any]:
    error = simulated / measured - 1
    return {"name": name, "unit": unit, "simulated": simulated, "measured": measured, "error": error}


# --- from one replica to a thousand ---


def sizes() -> dict[str, Any]:
    """The same load a replica at each size: with as many proxies and ingresses as that takes, and with the shipped
    proxy and ingresses while they do."""
    return {
        kind: {"capacity_per_s": capacity(profile, lengths), "rows": list(_sizes(profile, lengths, most))}
        for kind, profile, lengths, most in (("cpu", cpu(), SHORT, 1000), ("large", h200_large(), CHAT, 1000))
    }


def _sizes(profile: Profile, lengths: Uniform, most: int) -> Iterator[dict[str, Any]]:
    each = LOAD * capacity(profile, lengths)
    proxy, ingress = path_costs()
    for replicas in (size for size in SIZES if size <= most):
        seconds = float(np.clip(30_000 / (each * replicas), 40, 120))
        enough = path_for(profile, lengths, each * replicas, replicas)
        paths = {"enough": enough}
        if replicas <= 10:
            paths["shipped"] = (1, 4)
        for name, (proxies, ingresses) in paths.items():
            setup = of(profile, replicas=replicas, proxies=proxies, ingresses=ingresses, proxy=proxy, ingress=ingress)
            result = Cluster(setup, lengths=lengths, seed=SEED).run(steady(each * replicas), seconds)
            yield {"replicas": replicas, "path": name, "proxies": proxies, "ingresses": ingresses, **row_of(result)}


def steady(per_s: float) -> Rate:
    return lambda _: per_s


def path_for(profile: Profile, lengths: Uniform, requests_per_s: float, replicas: int) -> tuple[int, int]:
    """(proxies, ingresses) that stay below `PATH_USE`, and hold the requests that are open at once."""
    events, _ = streams(profile, lengths)
    needs = [math.ceil(requests_per_s * work(cost, events) / PATH_USE) for cost in path_costs()]
    return needs[0], max(needs[1], math.ceil(replicas * profile.limits.max_batch_size / 1000))


def work(cost: PathCost, events: float) -> float:
    """Seconds of one process for a stream of so many events beside its first."""
    return cost.request_s + (1 + events) * cost.event_s


def row_of(result: Result) -> dict[str, Any]:
    """Of the second half: in the first the batches fill."""
    since = result.seconds / 2
    first, last = result.series[len(result.series) // 2], result.series[-1]
    return {
        "seconds": result.seconds,
        "asked_per_s": result.arrived / result.seconds,
        "refused": result.refused / max(1, result.arrived),
        "delivered_per_s": (last[5] - first[5]) / max(1.0, last[0] - first[0]),
        "first_token_p50_s": result.quantile(0.5, since=since),
        "first_token_p99_s": result.quantile(0.99, since=since),
        "answer_p99_s": float(np.quantile(result.answer_s, 0.99)) if len(result.answer_s) else math.nan,
        "use": result.use,
        "proxy_use": result.proxy_use,
        "ingress_use": result.ingress_use,
    }


# --- the autoscaler ---


def day() -> dict[str, Any]:
    """A day whose load goes from a tenth of four replicas' to nine tenths, with the shipped settings; and its two
    busiest hours with four replicas all the time."""
    profile = cpu()
    peak = 0.9 * 4 * capacity(profile, CHAT)

    def rate(t: float) -> float:
        return peak * (1 / 9 + 8 / 9 * (0.5 - 0.5 * math.cos(2 * math.pi * t / DAY_S)) ** 2)

    noon = DAY_S / 2 - 3600
    found = {
        "shipped": _scaled(profile, rate, DAY_S, replicas=1, config=shipped()),
        "four replicas, two busiest hours": _scaled(profile, lambda t: rate(noon + t), 7200, replicas=4, config=None),
    }
    for run in found.values():
        run["peak_per_s"] = peak
    return found


def steady_loads() -> list[dict[str, Any]]:
    """An hour of a load that does not change, in what one replica can answer: how often replicas are added or taken
    away."""
    rows = []
    for profile in (cpu(), h200_large()):
        for load in (0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.2, 2.6):
            rate = steady(load * capacity(profile, CHAT))
            run = _scaled(profile, rate, 3600, replicas=math.ceil(load), config=shipped(max_replicas=20))
            told = {name: run[name] for name in ("changes", "replica_hours", "first_token_p99_s")}
            rows.append({"profile": profile.name, "load": load} | told)
    return rows


CROWD_AT, RISE_S, CROWD_S, AFTER_S = 300.0, 60.0, 600.0, 1500.0


def crowd_rate(base: float) -> Rate:
    def rate(t: float) -> float:
        if t < CROWD_AT or t > CROWD_AT + CROWD_S:
            return base
        return base * (1 + 9 * min(1.0, (t - CROWD_AT) / RISE_S))

    return rate


def crowd() -> dict[str, Any]:
    """Ten times as many requests within a minute, for ten minutes; then as before. Up to 100 replicas."""
    new_node_s = 180.0
    large = h200_large(max_batch_size=64)
    patient = {"policy_kwargs": {"target_queued_s": 40}}
    runs: list[tuple[str, Profile, dict[str, Any]]] = [
        ("CPU, shipped", cpu(), {}),
        ("CPU, target_queued_s 40", cpu(), patient),
        ("CPU, on nodes that must start first", replace(cpu(), start_s=new_node_s), {}),
        ("large, shipped", large, {}),
        ("large, target_queued_s 40", large, patient),
        ("large, batches of 256", h200_large(), {}),
    ]
    found = {}
    for name, profile, changes in runs:
        base = 2 * 0.7 * capacity(profile, CHAT)
        config = shipped(max_replicas=100, **changes)
        seconds = CROWD_AT + CROWD_S + AFTER_S
        found[name] = _scaled(profile, crowd_rate(base), seconds, replicas=2, config=config)
        found[name] |= {"needed": 10 * base / capacity(profile, CHAT), "start_s": profile.start_s}
        found[name] |= {"base_per_s": base, "name": profile.name}
    return found


def _scaled(profile: Profile, rate: Rate, seconds: float, *, replicas: int, config: Any) -> dict[str, Any]:
    autoscaler = None if config is None else Autoscaler(config, replicas=replicas)
    # Proxies and ingresses enough, and at no cost: how many requests they hold must not be what decides.
    setup = of(profile, replicas=replicas, autoscaler=autoscaler, proxies=100, ingresses=100)
    result = Cluster(setup, lengths=CHAT, seed=SEED).run(rate, seconds)
    targets = [row[1] for row in result.series]
    every = max(1, round(seconds / 150))
    return {
        "seconds": result.seconds,
        "asked_per_s": result.arrived / result.seconds,
        "refused": result.refused / max(1, result.arrived),
        "first_token_p50_s": result.quantile(0.5),
        "first_token_p99_s": result.quantile(0.99),
        "answer_p99_s": float(np.quantile(result.answer_s, 0.99)),
        "use": result.use,
        "replica_hours": result.replica_s / 3600,
        "most": max(targets),
        "changes": sum(a != b for a, b in zip(targets, targets[1:], strict=False)),
        "turns": turns(targets),
        "series": [
            {"t": row[0], "target": row[1], "waiting": row[3], "rate": rate(row[0])} for row in result.series[::every]
        ],
    }


def turns(targets: list[int]) -> int:
    """How often it changed its mind: up after down, or down after up."""
    directions = [b > a for a, b in zip(targets, targets[1:], strict=False) if a != b]
    return sum(a != b for a, b in zip(directions, directions[1:], strict=False))


# --- 500 at once ---


def target() -> list[dict[str, Any]]:
    """500 requests at once, each client with its next when it is answered, on 20 and 40 GPUs."""
    proxy, ingress = path_costs()
    rows = []
    for profile in (h200(), h200_large()):
        for replicas in (1, 20, 40):
            for proxies, ingresses in ((1, 4), (5, 10), (10, 40)):
                setup = of(
                    profile, replicas=replicas, proxies=proxies, ingresses=ingresses, proxy=proxy, ingress=ingress
                )
                result = Cluster(setup, lengths=CHAT, seed=SEED).run_closed(500, math.inf, requests=5000)
                row = {"profile": profile.name, "replicas": replicas, "proxies": proxies, "ingresses": ingresses}
                rows.append(row | row_of(result) | {"delivered_per_s": result.delivered_tokens / result.seconds})
    return rows


def gathering() -> list[dict[str, Any]]:
    """A step that reads a prompt is not replayed on a GPU, and takes several times as long: what it would bring if
    prompts waited for each other, and if a step could read more of them."""
    rows = []
    for step_tokens in (512, 4096):
        for gather_s in (0.0, 0.1):
            profile = h200(gather_s=gather_s, max_step_tokens=step_tokens)
            most = capacity(profile, CHAT)
            half = steady(0.5 * capacity(h200(), CHAT))
            result = Cluster(of(profile), lengths=CHAT, seed=SEED).run(half, 30)
            row = {"max_step_tokens": step_tokens, "gather_s": gather_s, "most_tokens_per_s": most * CHAT.mean[1]}
            rows.append(row | {name: result.quantile(q) for name, q in (("p50_s", 0.5), ("p99_s", 0.99))})
    return rows


# --- what gives way first, by arithmetic ---


def bottlenecks() -> list[dict[str, Any]]:
    """At how many replicas each single process is busy all the time, at `LOAD`."""
    proxy, ingress = path_costs()
    rows = []
    for profile, lengths in ((cpu(), SHORT), (cpu(), CHAT), (h200(), CHAT), (h200_large(), CHAT)):
        requests = LOAD * capacity(profile, lengths)
        events, open_s = streams(profile, lengths)
        rows.append(
            {
                "profile": profile.name,
                "answer_tokens": lengths.mean[1],
                "requests_per_s": requests,
                "events_per_request": events,
                "open_s": open_s,
                "one proxy": 1 / (requests * work(proxy, events)),
                "four ingresses": 4 / (requests * work(ingress, events)),
                "open at an ingress that is busy": open_s / work(ingress, events),
                "limiter": 1 / (requests * limiter_request_s()),
            }
        )
    return rows


SCENARIOS: dict[str, Callable[[], Any]] = {
    "validation": validation,
    "sizes": sizes,
    "day": day,
    "steady": steady_loads,
    "crowd": crowd,
    "target": target,
    "gathering": gathering,
    "bottlenecks": bottlenecks,
}
