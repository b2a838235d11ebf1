"""How many workers an elastic run gets, known at once: after a loss, and after a run that was killed."""

import contextlib
from typing import Any

import ray
from ray._private.state import actors
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.state.schema import RunStatus
from ray.train.v2._internal.state.state_actor import get_state_actor

_ANSWER_WITHIN_S = 5.0


class CountAgain(ControllerCallback):
    """Runs in Ray Train's controller, which asks Ray's coordinator how many workers there is room for. That counts the
    nodes every 20 s by itself, and till then has it try, and try again, with the room of a node that is gone."""

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """After a loss, and after each start of a group that found no room."""
        with contextlib.suppress(RayError):  # then it is known somewhat later
            coordinator = get_or_create_autoscaling_coordinator()
            ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=_ANSWER_WITHIN_S)


def release_room_of_dead_runs() -> None:
    """Ray's coordinator keeps the room of a run that was killed for three minutes, which an elastic run would wait."""
    with contextlib.suppress(RayError, ValueError):  # ValueError: nothing was trained here yet
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        runs = get_state_actor()
        for run in ray.get(runs.get_train_runs.remote(), timeout=_ANSWER_WITHIN_S).values() if runs else ():
            # One that finished has given its room back: of a sweep's trials the next need not ask after all before it.
            if run.status != RunStatus.FINISHED and actors(run.controller_actor_id).get("State", "DEAD") == "DEAD":
                ray.get(coordinator.cancel_request.remote(f"train-{run.id}"), timeout=_ANSWER_WITHIN_S)
