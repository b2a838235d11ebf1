"""What travels between the deployments: plain, picklable, blind to HTTP.

A predictable failure travels as a `Refusal`, not as an exception: Ray would log a traceback for each prompt that is too
long, and wrap it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from app.engine.sequence import FinishReason


@dataclass(frozen=True)
class RagPrompt:
    """A question and what was found for it, best first; the generator takes as many passages as fit."""

    question: str
    passages: tuple[str, ...]


Prompt = str | tuple[int, ...] | RagPrompt


@dataclass(frozen=True)
class GenerateRequest:
    model: str
    prompts: tuple[Prompt, ...]
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def is_deterministic(self) -> bool:
        """Whether the same request gets the same answer again."""
        return self.temperature == 0 or self.seed is not None

    def identity(self) -> dict[str, Any]:
        """All that shapes the answer, besides the model, as JSON values."""
        return asdict(self) | {"model": None}


@dataclass(frozen=True)
class ModelInfo:
    name: str
    hash: str
    """Content hash of base, tokenizer, precision and delta: what an answer depends on."""
    context_length: int
    template: dict[str, Any]
    """How a question becomes a prompt: what `app.data.prompts.template_from_json` reads."""


@dataclass(frozen=True)
class PromptInfo:
    num_tokens: int
    num_passages: int = 0
    """How many of a `RagPrompt`'s passages fitted."""


@dataclass(frozen=True)
class Started:
    """First of a stream: the request runs."""

    model_hash: str
    prompts: tuple[PromptInfo, ...]
    was_cached: bool = False


@dataclass(frozen=True)
class Piece:
    """New text of prompt `index`; the last piece of each prompt has a finish reason."""

    index: int
    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Choice:
    text: str
    finish_reason: FinishReason
    num_tokens: int
    prompt: PromptInfo


@dataclass(frozen=True)
class Completion:
    """A whole answer: one choice per prompt."""

    model_hash: str
    choices: tuple[Choice, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(choice.prompt.num_tokens for choice in self.choices)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Completion":
        """Raises KeyError or TypeError where `values` are not what `to_json` wrote."""
        choices = tuple(Choice(**choice | {"prompt": PromptInfo(**choice["prompt"])}) for choice in values["choices"])
        return cls(model_hash=values["model_hash"], choices=choices)


@dataclass(frozen=True)
class Refusal:
    """Why a request gets no answer, in terms of HTTP and of OpenAI's error object."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: int | None = None


class Collector:
    """Puts a stream's pieces together to the `Completion` that an unstreamed request gets."""

    def __init__(self, started: Started) -> None:
        self._started = started
        self._texts = [""] * len(started.prompts)
        self._tokens = [0] * len(started.prompts)
        self._reasons: dict[int, FinishReason] = {}

    def add(self, piece: Piece) -> None:
        self._texts[piece.index] += piece.text
        self._tokens[piece.index] += piece.num_tokens
        if piece.finish_reason:
            self._reasons[piece.index] = piece.finish_reason

    def completion(self) -> Completion:
        """Once every prompt has had its last piece."""
        choices = (
            Choice(self._texts[index], self._reasons[index], self._tokens[index], prompt)
            for index, prompt in enumerate(self._started.prompts)
        )
        return Completion(self._started.model_hash, tuple(choices))
