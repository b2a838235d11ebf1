"""What travels between the deployments: plain, picklable, blind to HTTP.

A predictable failure travels as a `Refusal`, not as an exception: Ray would log a traceback for each prompt that is too
long, and wrap it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from app.data.records import Message
from app.engine.events import FinishReason


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation that the model is to go on with, in its own template."""

    messages: tuple[Message, ...]
    passages: tuple[str, ...] = ()
    """What was found for the last message, best first; the generator takes as many as fit."""


@dataclass(frozen=True)
class Retrieved:
    """What was found for a question."""

    passages: tuple[dict[str, Any], ...]
    """The fields of `app.retrieval.search.Passage`, best passage first."""
    version: str
    """Of the documents that were searched: what rests on the passages holds as long as it stays the same."""

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(passage["text"] for passage in self.passages)


@dataclass(frozen=True)
class Embeddings:
    vectors: np.ndarray
    """float32 [texts, width]."""
    num_tokens: int
    """Of all texts."""


Prompt = str | tuple[int, ...] | ChatPrompt

CacheResult = Literal["hit", "semantic", "miss"]
"""Whether an answer was there, was there for another wording of the question, or was computed."""


@dataclass(frozen=True)
class GenerateRequest:
    model: str
    prompts: tuple[Prompt, ...]
    max_tokens: int
    temperature: float
    n: int = 1
    """Answers to each prompt."""
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report each token's log-probability, and those of so many of the likeliest ones."""

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def is_deterministic(self) -> bool:
        """Whether the same request gets the same answer again."""
        return self.temperature == 0 or self.seed is not None

    def identity(self) -> dict[str, Any]:
        """All that shapes the answer, besides the model, as JSON values."""
        values = asdict(self) | {"model": None}
        if self.temperature == 0:  # takes the likeliest token, whatever these say
            values |= {"seed": None, "top_p": 1.0, "top_k": None, "min_p": 0.0}
        return values


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
    """How many of a `ChatPrompt`'s passages fitted."""


@dataclass(frozen=True)
class Started:
    """First of a stream: the request runs."""

    model_hash: str
    prompts: tuple[PromptInfo, ...]
    cache: CacheResult = "miss"


@dataclass(frozen=True)
class TokenLogprob:
    text: str
    """With a replacement character where the token is no whole character."""
    bytes: tuple[int, ...]
    logprob: float
    """Natural logarithm of its probability."""
    top: tuple["TokenLogprob", ...] = ()
    """The likeliest tokens in its place, likeliest first."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TokenLogprob":
        top = tuple(map(cls.from_json, values["top"]))
        return cls(values["text"], tuple(values["bytes"]), values["logprob"], top)


@dataclass(frozen=True)
class Piece:
    """New text of choice `index`; the last piece of each choice has a finish reason.

    The `n` answers to one prompt follow each other: choice `index` answers prompt `index // n`.
    """

    index: int
    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of its tokens, where the request asked for them."""
    step: int | None = None
    """The engine's step that made the last of them; none for an answer that was kept."""

    def followed_by(self, later: "Piece") -> "Piece":
        """Both as one; `later` is of the same choice."""
        return Piece(
            self.index,
            self.text + later.text,
            self.num_tokens + later.num_tokens,
            later.finish_reason,
            (*self.logprobs, *later.logprobs),
            later.step,
        )


@dataclass(frozen=True)
class Choice:
    text: str
    finish_reason: FinishReason
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer: `n` choices per prompt."""

    model_hash: str
    prompts: tuple[PromptInfo, ...]
    choices: tuple[Choice, ...]

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, however many answers it gets."""
        return sum(prompt.num_tokens for prompt in self.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Completion":
        """Raises KeyError or TypeError where `values` are not what `to_json` wrote."""
        choices = tuple(
            Choice(**choice | {"logprobs": tuple(map(TokenLogprob.from_json, choice["logprobs"]))})
            for choice in values["choices"]
        )
        prompts = tuple(PromptInfo(**prompt) for prompt in values["prompts"])
        return cls(model_hash=values["model_hash"], prompts=prompts, choices=choices)


SHUTTING_DOWN = "shutting_down"
"""Code of the refusal of who is about to end; another may answer."""


@dataclass(frozen=True)
class Refusal:
    """Why a request gets no answer, in terms of HTTP and of OpenAI's error object."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: int | None = None


INTERNAL_ERROR = Refusal(500, "the server failed to answer; its log says why", code="internal_error")

Items = tuple[Started | Piece | Refusal, ...]
"""What comes of a request at once. They travel together, because a message costs more than what is in it."""


class Collector:
    """Puts a stream's pieces together to the `Completion` that an unstreamed request gets."""

    def __init__(self, started: Started) -> None:
        self._started = started
        self._choices: dict[int, list[Piece]] = {}

    def add(self, piece: Piece) -> None:
        self._choices.setdefault(piece.index, []).append(piece)

    def completion(self) -> Completion:
        """Once every choice has had its last piece."""
        choices = tuple(_joined(pieces) for _, pieces in sorted(self._choices.items()))
        return Completion(self._started.model_hash, self._started.prompts, choices)


def _joined(pieces: Sequence[Piece]) -> Choice:
    reason = pieces[-1].finish_reason
    assert reason is not None
    return Choice(
        text="".join(piece.text for piece in pieces),
        finish_reason=reason,
        num_tokens=sum(piece.num_tokens for piece in pieces),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
    )
