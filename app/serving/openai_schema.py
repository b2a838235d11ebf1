"""The wire: requests and responses in OpenAI's shapes. Knows no models and no Ray.

A parameter that this server cannot honour is refused by name, unless it says what is done anyway (`best_of=1`).
"""

import math
import time
import uuid
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from app import __version__
from app.serving import messages
from app.serving.messages import (
    Choice,
    Completion,
    GenerateRequest,
    Piece,
    Refusal,
    Started,
    TokenLogprob,
)

UNSUPPORTED = "unsupported_parameter"
COMBINATION = "invalid_combination"
"""Parameters that are right one by one, and not together."""
# OpenAI's parameters that are not built (yet), with the values that ask for nothing.
_INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half a character; no tokenizer takes it
        raise PydanticCustomError("invalid_unicode", "half of a surrogate pair is not text") from None
    return text


def _whole(value: Any) -> Any:
    """3 for 3.0: JSON has one kind of number, and its schemas call both integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_prompt(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One message instead of one for each kind of prompt that this is not."""
    if value == []:
        raise PydanticCustomError("prompt_empty", "must not be an empty list")
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError(
            "prompt_type", "must be a string, a list of strings, a list of token ids, or a list of such lists"
        ) from None


def refuse_combination(message: str, *, param: str) -> NoReturn:
    """From a validator of the whole request."""
    raise PydanticCustomError(COMBINATION, "{message}", {"message": message, "param": param})


Item = TypeVar("Item")
NonEmptyList = Annotated[list[Item], Field(min_length=1)]
Text = Annotated[str, AfterValidator(_encodable)]
WHOLE = BeforeValidator(_whole)
Integer = Annotated[int, WHOLE]
Prompt = Annotated[
    Text | NonEmptyList[Text] | NonEmptyList[Integer] | NonEmptyList[list[Integer]], WrapValidator(_check_prompt)
]
StopString = Annotated[Text, Field(min_length=1, max_length=200)]
_MOST_STOPS = Field(max_length=4)
StopStrings = Annotated[
    list[StopString],
    _MOST_STOPS,
    BeforeValidator(
        lambda value: [value] if isinstance(value, str) else value,
        json_schema_input_type=StopString | Annotated[list[StopString], _MOST_STOPS],
    ),
]
MaxTokens = Annotated[int, Field(ge=1), WHOLE]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]


class Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)


class WireRequest(Wire):
    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}  # null means: the default
        wrong = [key for key in given if key in _INERT_VALUES and not _is_inert(key, given[key])]
        wrong += [key for key in given if key not in _INERT_VALUES and key not in cls.model_fields]
        if wrong:
            names = _printable(", ".join(wrong))
            param = _printable(wrong[0])
            raise PydanticCustomError(
                UNSUPPORTED, "not supported by this server: {names}", {"names": names, "param": param}
            )
        return {key: value for key, value in given.items() if key not in _INERT_VALUES}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """As `_refuse_unsupported` reads it: null is nothing, in every field."""
        schema = handler(core_schema)
        whole = handler.resolve_ref_schema(schema)
        for name, field in whole.get("properties", {}).items():
            if name not in whole.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                about = {key: field.pop(key) for key in ("title", "description", "default", "examples") if key in field}
                whole["properties"][name] = {"anyOf": [field, {"type": "null"}], **about}
        whole["additionalProperties"] = {"type": "null"}
        return schema


class StreamOptions(WireRequest):
    include_usage: bool = False
    """Send a last chunk with the token counts."""


class SamplingRequest(WireRequest):
    """How tokens are chosen, and what is sent of them."""

    model: Annotated[Text, Field(examples=["pacos"])]
    n: Annotated[int, Field(ge=1, le=128), WHOLE] = 1
    """Answers to each prompt."""
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, Field(ge=1), WHOLE] | None = None
    """Draw from the k likeliest tokens only; not in OpenAI's own API, as the next two and `ignore_eos`."""
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """Draw from tokens of at least this share of the likeliest one's probability only."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[
        dict[TokenId, Bias], Field(max_length=300, json_schema_extra={"additionalProperties": False})
    ] = {}
    seed: Integer | None = None
    """Equal seeds give equal answers."""
    stop: StopStrings = []
    ignore_eos: bool = False
    """Go on to `max_tokens`, also past an end of text."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None
    """Accepted, and not used."""

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options and not self.stream:
            refuse_combination("stream_options needs stream=true", param="stream_options")
        return self

    def _request(
        self, prompts: tuple[messages.Prompt, ...], *, max_tokens: int, logprobs: int | None
    ) -> GenerateRequest:
        return GenerateRequest(
            model=self.model,
            prompts=prompts,
            max_tokens=max_tokens,
            temperature=self.temperature,
            n=self.n,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            seed=self.seed,
            stop=tuple(self.stop),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class CompletionRequest(SamplingRequest):
    prompt: Annotated[Prompt, Field(examples=["An adult alpaca eats"])]
    """Raw text or token ids; a list of either asks for several completions."""
    max_tokens: MaxTokens = 16
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    """Send each token's log-probability, and those of so many of the likeliest ones."""

    def to_request(self) -> GenerateRequest:
        return self._request(_prompts(self.prompt), max_tokens=self.max_tokens, logprobs=self.logprobs)


class AnswerRequest(WireRequest):
    """What the routes beside OpenAI's share; greedy if nothing is said."""

    model: Text | None = None
    """The base, if not given."""
    max_tokens: MaxTokens = 128
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Integer | None = None
    stop: StopStrings = []


class Usage(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(Wire):
    """One entry for each token, in all four lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Where the token begins, in characters of the answer."""


class CompletionChoice(Wire):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionResponse(Wire):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pacos"
    context_length: int | None = None
    hash: str | None = None
    """Changes with every weight: equal hashes answer equally."""
    template: dict[str, Any] | None = None
    """How a question becomes a prompt for `/v1/completions`; `/v1/rag` does it by itself. None: a model that only
    embeds."""


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[Model]


class Greeting(Wire):
    name: str
    version: str = __version__
    documentation: str = "/docs"


class ErrorBody(Wire):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Wire):
    error: ErrorBody


def error_response(refusal: Refusal) -> ErrorResponse:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
    kind = kinds.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    return ErrorResponse(
        error=ErrorBody(
            message=_printable(refusal.message),
            type=kind,
            param=refusal.param,
            code=refusal.code,
        )
    )


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    return math.floor(time.time())


def completion_response(request: CompletionRequest, completion: Completion) -> CompletionResponse:
    return CompletionResponse(
        id=new_id("cmpl"),
        created=now(),
        model=request.model,
        choices=[
            completion_choice(index, choice, asks_logprobs=request.logprobs is not None)
            for index, choice in enumerate(completion.choices)
        ],
        usage=usage(completion.prompt_tokens, completion.completion_tokens),
    )


class CompletionStream:
    """The chunks of one streamed answer."""

    def __init__(self, request: CompletionRequest) -> None:
        self.request = request
        self._head: dict[str, Any] = {"id": new_id("cmpl"), "created": now(), "model": request.model}
        self._offsets: dict[int, int] = {}

    def first_chunk(self, started: Started) -> None:
        """None: nothing is known before the first word."""

    def chunk(self, piece: Piece) -> CompletionResponse:
        offset = self._offsets.get(piece.index, 0)
        self._offsets[piece.index] = offset + sum(len(token.text) for token in piece.logprobs)
        asks_logprobs = self.request.logprobs is not None
        choice = completion_choice(piece.index, piece, asks_logprobs=asks_logprobs, offset=offset)
        return CompletionResponse(**self._head, choices=[choice])

    def usage_chunk(self, usage: Usage) -> CompletionResponse:
        return CompletionResponse(**self._head, choices=[], usage=usage)


def completion_choice(index: int, choice: Choice | Piece, *, asks_logprobs: bool, offset: int = 0) -> CompletionChoice:
    """`offset`: the characters of the answer's earlier tokens."""
    logprobs = completion_logprobs(choice.logprobs, offset=offset) if asks_logprobs else None
    return CompletionChoice(index=index, text=choice.text, logprobs=logprobs, finish_reason=choice.finish_reason)


def completion_logprobs(tokens: Sequence[TokenLogprob], *, offset: int) -> CompletionLogprobs:
    lengths = [len(token.text) for token in tokens]
    return CompletionLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[{likely.text: likely.logprob for likely in reversed(token.top)} for token in tokens],
        text_offset=list(accumulate(lengths, initial=offset))[:-1],
    )


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[messages.Prompt, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and isinstance(prompt[0], int):
        return (tuple(prompt),)
    return tuple(text if isinstance(text, str) else tuple(text) for text in prompt)  # type: ignore[arg-type]


def _is_inert(key: str, value: Any) -> bool:
    # True == 1 in Python, but not on the wire.
    return any(value == inert and isinstance(value, bool) == isinstance(inert, bool) for inert in _INERT_VALUES[key])


def _printable(text: str) -> str:
    """`text` may quote what the client sent, and that may hold what UTF-8 does not."""
    return text.encode(errors="replace").decode()
