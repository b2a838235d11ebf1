"""The serving cluster in simulated time: clients, Serve's proxies, ingresses, the router, generator replicas and the
autoscaler.

A loop over a heap of events. SimPy does the same with processes and resources; none of them would be used here, and
its loop takes twice as long an event. An engine's steps are simulated one by one (`replica.py`). What carries the
tokens of streams is a fluid: proxies and ingresses work off requests in the order that they come, and the events of all
streams take their even share of each. A run is decided by its seed.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from typing import TypeVar

import numpy as np

from benchmarks.scale.autoscaler import Autoscaler
from benchmarks.scale.replica import EngineLimits, Replica, Request, StepTime

BATCHES_PER_S, LONGEST_PAUSE_S = 120.0, 1.0
"""How often a replica sends tokens: `EngineFront`'s."""
MAX_ONGOING, MAX_QUEUED = 1000, 1000
"""Of an ingress, and at each proxy: `application.py`'s."""
Lengths = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
"""Prompt and answer tokens of so many requests."""
Thing = TypeVar("Thing")
Rate = Callable[[float], float]
"""Requests a second at a time."""


@dataclass(frozen=True)
class PathCost:
    """Seconds that one request, and one event of a stream, occupy a process."""

    request_s: float = 0.0
    event_s: float = 0.0


@dataclass(frozen=True)
class Setup:
    step_time: StepTime
    limits: EngineLimits = EngineLimits()
    replicas: int = 1
    proxies: int = 1
    ingresses: int = 1
    proxy: PathCost = PathCost()
    ingress: PathCost = PathCost()
    start_s: float = 20.0
    """From the decision to the first request of a new replica."""
    autoscaler: Autoscaler | None = None
    choices: int = 2
    """Replicas that the router compares: Serve's two; 1 is a router that knows nothing."""


@dataclass
class Result:
    seconds: float
    arrived: int = 0
    refused: int = 0
    answered: int = 0
    """Whose last event was delivered within the run."""
    in_flight: int = 0
    tokens: int = 0
    """That were computed."""
    delivered_tokens: int = 0
    """Of answers that have come to their end."""
    events: float = 0.0
    first_token_s: np.ndarray = field(default_factory=lambda: np.empty(0))
    answer_s: np.ndarray = field(default_factory=lambda: np.empty(0))
    first_token_at: np.ndarray = field(default_factory=lambda: np.empty(0))
    """When those requests arrived."""
    replica_s: float = 0.0
    """Of all that were there or starting."""
    use: float = 0.0
    """Mean share of the places in a ready replica's batch that were taken."""
    proxy_use: float = 0.0
    ingress_use: float = 0.0
    series: list[tuple[float, int, int, int, int, int]] = field(default_factory=list)
    """Each second: time, target, ready replicas, waiting requests; refused and tokens delivered so far."""

    def quantile(self, share: float, *, since: float = 0.0, until: float = inf) -> float:
        """Of the time to the first token, of requests that arrived then."""
        chosen = self.first_token_s[(self.first_token_at >= since) & (self.first_token_at < until)]
        return float(np.quantile(chosen, share)) if len(chosen) else float("nan")


class _Server:
    """A single-threaded process on the path."""

    def __init__(self, cost: PathCost) -> None:
        self._cost = cost
        self._backlog_s = self._seen_at = self.busy_s = 0.0

    def wait(self, now: float, events_per_s: float, work_s: float = 0.0) -> float:
        """Seconds until `work_s` more are done; `events_per_s` come to it beside them."""
        passed, flow = now - self._seen_at, events_per_s * self._cost.event_s
        left_s = max(0.0, self._backlog_s + (flow - 1.0) * passed)
        self.busy_s += self._backlog_s + flow * passed - left_s
        self._backlog_s, self._seen_at = left_s + work_s, now
        return self._backlog_s

    def request(self, now: float, events_per_s: float) -> float:
        """Seconds until it is on its way; its first event is paid for with it."""
        return self.wait(now, events_per_s, self._cost.request_s + self._cost.event_s)


class Cluster:
    def __init__(self, setup: Setup, *, lengths: Lengths, seed: int = 0) -> None:
        self.setup = setup
        self._random = np.random.default_rng(seed)
        self._lengths = lengths
        self._replicas = [Replica(setup.step_time, setup.limits) for _ in range(setup.replicas)]
        self._ready = list(self._replicas)
        self._proxies = [_Server(setup.proxy) for _ in range(setup.proxies)]
        self._ingresses = [_Server(setup.ingress) for _ in range(setup.ingresses)]
        self._is_free = setup.proxy == setup.ingress == PathCost()
        self._events: list = []  # (time, number, function, argument)
        self._number = itertools.count()
        self._event_rates: dict[Replica, float] = dict.fromkeys(self._replicas, 0.0)
        self._event_rate = 0.0
        self._open = 0
        self._at_door: deque[Request] = deque()
        self._draws: Iterator[float] = iter(())
        self._to_ask = 0.0
        """By clients that wait for an answer first."""
        self._use_s, self._ready_s, self._gone_tokens = 0.0, 0, 0
        self._first: list[tuple[float, float]] = []
        self._answer_s: list[float] = []
        self.result = Result(0.0)

    def run(self, rate: Rate, seconds: float) -> Result:
        """Requests come at random, `rate(t)` a second."""
        return self._run(self._arrivals(rate, seconds), seconds)

    def run_closed(self, clients: int, seconds: float, *, requests: float = inf) -> Result:
        """Each client asks again once it is answered, `requests` in all."""
        prompts, news = self._lengths(self._random, clients)
        self._to_ask = requests - clients
        begun = (Request(int(p), int(n), 0.0) for p, n in zip(prompts, news, strict=True))
        return self._run(begun, seconds, most=requests)

    def _run(self, arrivals: Iterator[Request], seconds: float, *, most: float = inf) -> Result:
        self._at(1.0, self._tick, None)
        arrival = next(arrivals, None)
        result, events, now = self.result, self._events, 0.0
        while True:
            if arrival is not None and (not events or arrival.arrived <= events[0][0]):
                now = arrival.arrived
                if now > seconds:
                    break
                self._arrive(arrival, now)
                arrival = next(arrivals, None)
                continue
            if not events or events[0][0] > seconds:
                break
            now, _, function, argument = heappop(events)
            function(argument, now)
            if result.answered + result.refused >= most:
                seconds = now
                break
        self._finish(seconds)
        return result

    def _finish(self, seconds: float) -> None:
        result = self.result
        result.seconds = seconds
        result.in_flight = result.arrived - result.answered - result.refused
        result.first_token_at, result.first_token_s = np.array(self._first or np.empty((0, 2))).T
        result.answer_s = np.array(self._answer_s)
        result.use = self._use_s / max(1, self._ready_s)
        result.tokens = self._gone_tokens + sum(replica.tokens for replica in self._replicas)
        result.proxy_use = self._use(self._proxies, seconds)
        result.ingress_use = self._use(self._ingresses, seconds)

    def _use(self, servers: list[_Server], seconds: float) -> float:
        """The mean share of `seconds` that they were busy."""
        for server in servers:
            server.wait(seconds, self._event_rate / len(servers))
        return sum(server.busy_s for server in servers) / len(servers) / seconds

    # --- a request's way ---

    def _arrivals(self, rate: Rate, seconds: float) -> Iterator[Request]:
        """A Poisson process whose rate changes each second, of whole seconds."""
        for second in range(round(seconds)):
            count = int(self._random.poisson(rate(float(second))))
            times = np.sort(self._random.uniform(second, second + 1, count))
            prompts, news = self._lengths(self._random, count)
            for at, prompt, new in zip(times.tolist(), prompts.tolist(), news.tolist(), strict=True):
                yield Request(prompt, new, at)

    def _arrive(self, request: Request, now: float) -> None:
        self.result.arrived += 1
        if self._open >= MAX_ONGOING * len(self._ingresses):
            if len(self._at_door) >= MAX_QUEUED * len(self._proxies):
                self._refuse(now)
            else:
                self._at_door.append(request)
            return
        self._enter(request, now)

    def _enter(self, request: Request, now: float) -> None:
        self._open += 1
        if self._is_free:
            self._route(request, now)
            return
        request.path = proxy, ingress = self._one_of(self._proxies), self._one_of(self._ingresses)
        delay = proxy.request(now, self._event_rate / len(self._proxies))
        delay += ingress.request(now, self._event_rate / len(self._ingresses))
        if delay > 0:
            self._at(now + delay, self._route, request)
        else:
            self._route(request, now)

    def _route(self, request: Request, now: float) -> None:
        ready = self._ready
        replica = self._one_of(ready)
        if self.setup.choices > 1 and len(ready) > 1:
            other = self._one_of(ready)
            while other is replica:
                other = self._one_of(ready)
            if other.ongoing < replica.ongoing:
                replica = other
        if not replica.has_room:
            self._leave(now)
            self._refuse(now)
            return
        self._schedule(replica, replica.add(request, now))

    def _schedule(self, replica: Replica, at: float | None) -> None:
        if at is not None:
            self._at(at, self._advance, (replica, replica.version))

    def _advance(self, argument: tuple[Replica, int], now: float) -> None:
        replica, version = argument
        if version != replica.version:
            return  # a request came meanwhile, and was scheduled with another
        begun, ended, at = replica.advance(now)
        self._schedule(replica, at)
        if begun or ended:
            self._flow(replica)
            for request in begun:
                delay = self._delivery_s(request, now)
                self._first.append((request.arrived, now + delay - request.arrived))
            for request in ended:
                delay = self._delivery_s(request, now)
                if delay > 0:
                    self._at(now + delay, self._answered, request)
                else:
                    self._answered(request, now)
        if replica.stopping and not replica.ongoing:
            self._remove(replica, now)

    def _flow(self, replica: Replica) -> None:
        """How many events a second its streams send now."""
        rate = 0.0
        if replica.decoding:
            pause = min(LONGEST_PAUSE_S, replica.running / BATCHES_PER_S)
            rate = replica.decoding / max(pause, replica.decode_step_s())
        self._event_rate += rate - self._event_rates[replica]
        self._event_rates[replica] = rate

    def _delivery_s(self, request: Request, now: float) -> float:
        """How long an event takes back to the client."""
        if self._is_free:
            return 0.0
        proxy, ingress = request.path
        there = proxy.wait(now, self._event_rate / len(self._proxies))
        return there + ingress.wait(now, self._event_rate / len(self._ingresses))

    def _answered(self, request: Request, now: float) -> None:
        self.result.answered += 1
        self.result.delivered_tokens += request.new
        self._answer_s.append(now - request.arrived)
        self._leave(now)
        self._again(now)

    def _refuse(self, now: float) -> None:
        self.result.refused += 1
        self._again(now)

    def _again(self, now: float) -> None:
        if self._to_ask > 0:
            self._to_ask -= 1
            prompts, news = self._lengths(self._random, 1)
            self._arrive(Request(int(prompts[0]), int(news[0]), now), now)

    def _leave(self, now: float) -> None:
        self._open -= 1
        if self._at_door:
            self._enter(self._at_door.popleft(), now)

    # --- replicas come and go ---

    def _tick(self, _: None, now: float) -> None:
        result, autoscaler = self.result, self.setup.autoscaler
        if autoscaler is not None:
            self._ready = [r for r in self._replicas if r.ready_at <= now and not r.stopping]
            self._scale(autoscaler.tick(self._ready, now), now)
        result.replica_s += len(self._replicas)
        self._ready_s += len(self._ready)
        self._use_s += sum(replica.use for replica in self._ready)
        result.events += self._event_rate
        waiting = sum(len(replica.waiting) for replica in self._replicas) + len(self._at_door)
        target = len(self._ready) if autoscaler is None else autoscaler.target
        result.series.append((now, target, len(self._ready), waiting, result.refused, result.delivered_tokens))
        self._at(now + 1.0, self._tick, None)

    def _scale(self, target: int, now: float) -> None:
        there = [replica for replica in self._replicas if not replica.stopping]
        for _ in range(target - len(there)):
            replica = Replica(self.setup.step_time, self.setup.limits, ready_at=now + self.setup.start_s)
            self._replicas.append(replica)
            self._event_rates[replica] = 0.0
        for replica in there[target:]:  # the newest first, as those that still start
            replica.stopping = True
            self._ready = [other for other in self._ready if other is not replica]
            if not replica.ongoing:
                self._remove(replica, now)

    def _remove(self, replica: Replica, now: float) -> None:
        self._replicas.remove(replica)
        self._event_rate -= self._event_rates.pop(replica)
        self._gone_tokens += replica.tokens

    # --- the loop's own ---

    def _at(self, at: float, function: Callable, argument: object) -> None:
        heappush(self._events, (at, next(self._number), function, argument))

    def _one_of(self, things: list[Thing]) -> Thing:
        if len(things) == 1:
            return things[0]
        draw = next(self._draws, None)
        if draw is None:
            self._draws = iter(self._random.random(4096).tolist())
            draw = next(self._draws)
        return things[int(draw * len(things))]
