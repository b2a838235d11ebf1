"""What is said once a process: which code computes, where it is not the kernel."""

import functools
import logging

_logger = logging.getLogger("app.models.kernels")


@functools.cache
def say_once(level: int, message: str) -> None:
    """Log `message`, unless this process already did."""
    _logger.log(level, message)
