"""How many workers an elastic run gets after a loss, known at once."""

import contextlib
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback

_ANSWER_WITHIN_S = 5.0


class CountAgain(ControllerCallback):
    """Runs in Ray Train's controller, which asks Ray's coordinator how many workers there is room for. That counts the
    nodes every 20 s by itself, and till then has it try, and try again, with the room of a node that is gone."""

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """After a loss, and after each start of a group that found no room."""
        with contextlib.suppress(RayError):  # then it is known somewhat later
            coordinator = get_or_create_autoscaling_coordinator()
            ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=_ANSWER_WITHIN_S)
