"""Ray Data's scheduling loop, at a pace. Imported where a dataset is made: it needs Ray."""

import time
from typing import Any

from ray.data import Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback

_PAUSE_S = 0.05


def pace(dataset: Dataset) -> None:
    """Have `dataset` be executed without the whole of a core: once its consumers have more than they can take, the loop
    of Ray Data 2.60 that starts and gathers tasks waits for nothing between its rounds."""
    dataset.context.custom_execution_callback_classes = [*dataset.context.custom_execution_callback_classes, _Pause]


class _Pause(ExecutionCallback):
    def on_execution_step(self, executor: Any) -> None:
        time.sleep(_PAUSE_S)
