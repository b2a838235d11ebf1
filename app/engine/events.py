"""What the engine reports of a request: tokens and ends, or why it cannot take it. Imports nothing of the engine."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


class InvalidRequest(ValueError):
    """A request that this model can never answer; `param` is the field that is wrong, where it is not the prompt."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(InvalidRequest):
    def __init__(self, *, prompt_length: int, context_length: int) -> None:
        super().__init__(
            f"the prompt has {prompt_length} tokens; the context of {context_length} must hold it and at least one "
            "generated token"
        )
        self.prompt_length = prompt_length
        self.context_length = context_length

    def __reduce__(self) -> tuple:
        # Exceptions with keyword arguments do not survive pickling by themselves, and servers send them on.
        return _context_length_exceeded, (self.prompt_length, self.context_length)


class QueueFull(Exception):
    """As many requests wait as may wait; try again later."""


@dataclass(frozen=True)
class Event:
    """One step of one answer: a token, an end, or both at once."""

    request_id: int
    token: int | None
    """None where a stop token ended the answer."""
    finish_reason: FinishReason | None = None
    index: int = 0
    """Which of the request's `n` answers."""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    stop: int | str | None = None
    """The stop token or text that ended the answer."""
    step: int = 0
    """The engine's, counted from 1; all answers of a step share its number."""


def _context_length_exceeded(prompt_length: int, context_length: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(prompt_length=prompt_length, context_length=context_length)
