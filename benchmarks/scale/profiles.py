"""The constants of the simulation, each with where it was measured, or what was assumed.

Recorded results of other benchmarks are read, not copied: a new recording changes the simulation.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation.workloads import workload
from benchmarks.scale.cluster import PathCost
from benchmarks.scale.replica import EngineLimits, Replica, Request, StepTime

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Profile:
    """One kind of generator replica."""

    name: str
    step_time: StepTime
    limits: EngineLimits
    start_s: float
    sources: dict[str, str] = field(hash=False, compare=False)
    """What each figure is from."""


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


@dataclass(frozen=True)
class Uniform:
    """Lengths of requests, evenly from the first to the last."""

    prompt: tuple[int, int]
    new: tuple[int, int]

    def __call__(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        prompts, news = ((low, high + 1) for low, high in (self.prompt, self.new))
        return random.integers(*prompts, count), random.integers(*news, count)

    @property
    def mean(self) -> tuple[float, float]:
        return sum(self.prompt) / 2, sum(self.new) / 2


SHORT = Uniform((16, 128), (16, 128))
"""As in the benchmarks' W2 and W3."""
CHAT = Uniform((64, 448), (64, 448))


def batch_run(requests: list[tuple[int, int]], step_time: StepTime, limits: EngineLimits) -> tuple[float, int, int]:
    """All at once into one engine: (seconds, steps, rows)."""
    replica, now, at = Replica(step_time, limits), 0.0, None
    for prompt, new in requests:
        at = replica.add(Request(prompt, new, 0.0), 0.0) or at
    while at is not None:
        now = at
        at = replica.advance(now)[2]
    return now, replica.steps, sum(prompt + new - 1 for prompt, new in requests)


# --- replicas ---


def cpu() -> Profile:
    """GPT-2 124M in bf16 on two cores of a Xeon. A step's time is a constant and a part for each row, which the runs of
    one request (W1) and of 64 at once (W2) decide; W3 is left to check it."""
    limits = EngineLimits(max_batch_size=128, max_queue=1000)
    runs = recorded("generation")["runs"]
    count = StepTime(((1, 1.0),), ((1, 1.0),), 0.0)  # of steps: how many follows from the schedule, not from the time
    equations, seconds = [], []
    for name in ("W1", "W2"):
        _, steps, rows = batch_run(_sizes(name), count, limits)
        equations.append((steps, rows))
        seconds.append(float(np.median([run["seconds"] for run in runs[name]["pacos_bf16"]])))
    each, row = np.linalg.solve(np.array(equations, float), np.array(seconds))
    line = ((0, float(each)), (1, float(each + row)))
    return Profile(
        "GPT-2 124M, two CPU cores",
        StepTime(line, line, float(row)),
        EngineLimits(max_batch_size=64, max_queue=512),
        start_s=20.0,
        sources={
            "step_time": "generation.json, pacos_bf16: W1 and W2 solved for a constant and a part for each row",
            "limits": "serve_config.yaml",
            "start_s": "assumed; scale-measured.json has what replicas without a model took",
        },
    )


def h200(*, gather_s: float = 0.0, max_step_tokens: int = 512) -> Profile:
    """GPT-2 124M in bf16 on an H200."""
    record = recorded("gpu-generation")["results"]
    graphs, eager = record["bf16"], record["bf16 without graphs"]
    decoding = tuple((size, graphs[f"batch {size}"]["step_s"]) for size in (1, 256))
    reading = tuple((size, eager[f"batch {size}"]["step_s"]) for size in (1, 256))
    prompt, new, batch = 64, 128, 256  # as benchmarks/gpu/generation.py measures
    total_s = batch * new / graphs["batch 256"]["total_tokens_per_s"]
    prompt_s = total_s - (new - 1) * decoding[1][1] - batch * prompt / 4096 * reading[0][1]
    return Profile(
        "GPT-2 124M, one H200",
        StepTime(decoding, reading, prompt_s / (batch * prompt)),
        EngineLimits(256, max_queue=512, max_step_tokens=max_step_tokens, gather_s=gather_s),
        start_s=30.0,
        sources={
            "step_time.decoding": "gpu-generation.json, bf16, batch 1 and 256; between them a line",
            "step_time.reading": "gpu-generation.json, bf16 without graphs: steps that read prompts are not recorded",
            "step_time.prompt_token_s": "gpu-generation.json, bf16, batch 256: what the run took beyond its steps",
            "limits.max_batch_size": "256 is what was measured",
            "start_s": "assumed: libraries and weights some 20 s, its first steps 3 to 4 s (warm_up_s)",
        },
    )


LARGE_PARAMETERS, LARGE_LAYERS, LARGE_WIDTH = 7e9, 32, 4096
FLOPS = 782e12
"""Of an H200's fastest bf16 product (gpu-training.json's machine, docs/training.md)."""
PROMPT_FLOPS_SHARE = 0.4
"""Assumed: of the above, what reading prompts reaches."""
CONTEXT = 384
"""Tokens that an answer has before it on average: a prompt and half of an answer of `CHAT`."""


def h200_large(*, max_batch_size: int = 256) -> Profile:
    """A decoder of 7e9 parameters on an H200, by memory bandwidth from what GPT-2 124M reaches of it. Not measured."""
    record = recorded("gpu-generation")
    bandwidth, graphs = record["bandwidth"], record["results"]["bf16"]
    place_bytes = 2 * 2 * LARGE_LAYERS * LARGE_WIDTH  # keys and values of a token in bf16
    points = []
    for size in (1, 256):
        num_bytes = 2 * LARGE_PARAMETERS + size * (CONTEXT) * place_bytes
        points.append((size, num_bytes / bandwidth / graphs[f"batch {size}"]["of_limit"]))
    return Profile(
        "7e9 parameters, one H200 (extrapolated)",
        StepTime(tuple(points), tuple(points), 2 * LARGE_PARAMETERS / (PROMPT_FLOPS_SHARE * FLOPS)),
        EngineLimits(max_batch_size, max_queue=512),
        start_s=60.0,
        sources={
            "step_time": "bytes a step reads / bandwidth / the share of it that GPT-2 124M reaches at batch 1 and 256 "
            "(gpu-generation.json): extrapolated, not measured",
            "step_time.prompt_token_s": "2 FLOPs a parameter at 0.4 of 782 TFLOP/s: assumed",
            "start_s": "assumed: 14 GB of weights come with it",
        },
    )


def _sizes(name: str) -> list[tuple[int, int]]:
    return [(len(request.ids), request.new_tokens) for request in workload(name)]


# --- what carries requests and tokens ---


def path_costs() -> tuple[PathCost, PathCost]:
    """(proxy, ingress), of scale-measured.json: processor time that a request and an event of a stream take there."""
    costs = recorded("scale-measured")["parts"]["path"]["median"][""]
    proxy, ingress = (
        PathCost(costs[f"{name}_request_ms"] / 1000, costs[f"{name}_event_ms"] / 1000) for name in ("proxy", "ingress")
    )
    return proxy, ingress


def limiter_request_s() -> float:
    return recorded("scale-measured")["parts"]["path"]["median"][""]["limiter_request_ms"] / 1000
