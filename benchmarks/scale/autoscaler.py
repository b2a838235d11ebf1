"""Ray Serve's autoscaler in simulated time: the project's own policy inside Serve's own factors and delays.

What is simulated is how loads come to the controller: a replica notes its load every fifth of `look_back_period_s`,
and sends what it noted every ten seconds; the controller takes the mean over `look_back_period_s`.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from ray.serve.autoscaling_policy import _apply_delay_logic, _apply_scaling_factors
from ray.serve.config import AutoscalingConfig

from app.serving.autoscaling import QUEUED_S, USE, TokenLoad
from benchmarks.scale.replica import Replica

RECORDS_A_LOOK_BACK = 5
PUSH_S = 10.0
SERVE_CONFIG = Path(__file__).parents[2] / "serve_config.yaml"


def shipped(**changes: Any) -> AutoscalingConfig:
    """The generator's `autoscaling_config` of serve_config.yaml, with `changes`; those of the policy in
    `policy_kwargs`."""
    deployments = yaml.safe_load(SERVE_CONFIG.read_text())["applications"][0]["deployments"]
    (settings,) = [each["autoscaling_config"] for each in deployments if each["name"] == "generator"]
    kwargs = settings["policy"]["policy_kwargs"] | changes.pop("policy_kwargs", {})
    return AutoscalingConfig(**settings | changes | {"policy": settings["policy"] | {"policy_kwargs": kwargs}})


class Reports:
    """What the controller knows of one replica."""

    def __init__(self, ready_at: float) -> None:
        self.mean: tuple[float, float] | None = None
        """(use, queued seconds)"""
        self._series: deque[tuple[float, float, float]] = deque()
        self._record_at = self._push_at = ready_at

    def tick(self, replica: Replica, now: float, look_back_s: float) -> None:
        if now >= self._record_at:
            self._record_at += look_back_s / RECORDS_A_LOOK_BACK
            self._series.append((now, replica.use, replica.queued_s))
            while self._series[0][0] <= now - look_back_s:
                self._series.popleft()
        if now >= self._push_at:
            self._push_at += PUSH_S
            count = len(self._series)
            self.mean = (sum(row[1] for row in self._series) / count, sum(row[2] for row in self._series) / count)


class Autoscaler:
    def __init__(self, config: AutoscalingConfig, *, replicas: int) -> None:
        self.config = config
        self.target = replicas
        self._policy = TokenLoad(**config.policy.policy_kwargs)
        self._reports: dict[Replica, Reports] = {}
        self._state: dict[str, Any] = {}

    def tick(self, ready: Sequence[Replica], now: float) -> int:
        """How many there should be, after one look at those that are ready."""
        config = self.config
        known = self._reports
        self._reports = {replica: known.get(replica) or Reports(replica.ready_at) for replica in ready}
        for replica, reports in self._reports.items():
            reports.tick(replica, now, config.look_back_period_s)
        means = {number: r.mean for number, r in enumerate(self._reports.values()) if r.mean is not None}
        metrics = {
            USE: {number: use for number, (use, _) in means.items()},
            QUEUED_S: {number: queued for number, (_, queued) in means.items()},
        }
        context = SimpleNamespace(target_num_replicas=self.target, aggregated_metrics=metrics)
        wanted, _ = self._policy(context)
        scaled = _apply_scaling_factors(wanted, len(ready), config)
        decided, self._state = _apply_delay_logic(max(0, scaled), self.target, config, self._state, _now=now)
        self.target = max(config.min_replicas, min(config.max_replicas, decided))
        return self.target
