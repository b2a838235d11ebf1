"""What ends a run for good, where Ray Train would try again: a mistake, a loss that diverges, Ctrl-C."""

from typing import Any

from ray.train import UserCallback

from app.errors import UserError
from app.training.channel import Channel
from app.training.interruption import Stopped

_FINAL = (UserError, FloatingPointError, Stopped)


class EndRun(UserCallback):
    """Runs in Ray Train's controller, which takes an error raised here for one that no retry mends, and ends.

    So one worker's mistake ends the run also while the others wait for that worker in a collective call.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        # Ray Train's wrapper keeps the worker's own exception in `_base_exc`.
        causes = [getattr(error, "_base_exc", error) for error in worker_exceptions.values()]
        for kind in _FINAL:
            for cause in causes:
                if isinstance(cause, kind):
                    raise cause
        if self._channel.is_closed():
            raise RuntimeError("the driver has gone")
