"""The wire of `/v1/chat/completions`, in OpenAI's shapes. Knows no models and no Ray."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from app.data.records import Message
from app.serving.messages import ChatPrompt, Choice, Completion, GenerateRequest, Piece, Started, TokenLogprob
from app.serving.openai_schema import (
    WHOLE,
    MaxTokens,
    SamplingRequest,
    Text,
    Usage,
    Wire,
    WireRequest,
    new_id,
    now,
    refuse_combination,
    usage,
)
from app.serving.retrieval_schema import Source, sources

Value = TypeVar("Value")
Left = Annotated[Value | None, Field(exclude_if=lambda value: value is None)]
"""A field that is left out rather than sent as null."""
NO_LIMIT = 2**20
"""Tokens, for a request that names none: the context ends the answer."""


def _joined_parts(content: Any) -> Any:
    """A text from OpenAI's list of parts, where all of them are text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("content_type", "must be text, or parts that are all of type 'text'")
        texts.append(part["text"])
    return "".join(texts)


class TextPart(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    type: Literal["text"]
    text: Text


class ChatMessage(WireRequest):
    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is another word for `system`."""
    content: Annotated[Text, BeforeValidator(_joined_parts, json_schema_input_type=Text | list[TextPart])]
    name: Text | None = None
    """Accepted, and not used."""


class ChatRequest(SamplingRequest):
    messages: Annotated[
        list[ChatMessage], Field(min_length=1, examples=[[{"role": "user", "content": "What is hay?"}]])
    ]
    max_tokens: MaxTokens | None = None
    """As many as the context has room for, if neither this nor the next is given."""
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    rag: bool = False
    """Look for passages of the server's documents, and put them before the model with the last message; not in
    OpenAI's own API."""
    rag_top_k: Annotated[int, Field(ge=1, le=50), WHOLE] | None = None
    """Passages to retrieve; the server's setting if not given."""

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            refuse_combination("top_logprobs needs logprobs=true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            refuse_combination("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
        if self.rag and self.messages[-1].role != "user":
            refuse_combination("rag needs a last message of the user, which asks", param="rag")
        return self

    def to_request(self, passages: tuple[str, ...] = ()) -> GenerateRequest:
        conversation = tuple(
            Message("system" if message.role == "developer" else message.role, message.content)
            for message in self.messages
        )
        return self._request(
            (ChatPrompt(conversation, passages),),
            max_tokens=self.max_completion_tokens or self.max_tokens or NO_LIMIT,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class TopLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Wire):
    content: list[ChatTokenLogprob]


class AssistantMessage(Wire):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Wire):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatResponse(Wire):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    citations: Left[list[Source]] = None
    """With `rag`, the passages that stood before the model, best first."""


class Delta(Wire):
    """What is new of a message."""

    role: Left[Literal["assistant"]] = None
    content: Left[str] = None


class ChunkChoice(Wire):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(Wire):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    citations: Left[list[Source]] = None
    """With `rag`, in the first chunk alone."""


def chat_response(
    request: ChatRequest, completion: Completion, *, citations: list[Source] | None = None
) -> ChatResponse:
    return ChatResponse(
        id=new_id("chatcmpl"),
        created=now(),
        model=request.model,
        choices=[_choice(request, index, choice) for index, choice in enumerate(completion.choices)],
        usage=usage(completion.prompt_tokens, completion.completion_tokens),
        citations=citations,
    )


class ChatStream:
    """The chunks of one streamed answer: the text of each choice joins to that of the unstreamed one."""

    def __init__(self, request: ChatRequest, *, passages: Sequence[Mapping[str, Any]] | None = None) -> None:
        self.request = request
        self._passages = passages
        self._head: dict[str, Any] = {"id": new_id("chatcmpl"), "created": now(), "model": request.model}
        self._begun: set[int] = set()
        self._blank: dict[int, tuple[TokenLogprob, ...]] = {}
        """Of choices without text so far, what is known of the tokens that came."""

    def first_chunk(self, started: Started) -> ChatChunk | None:
        """The citations, where there can be some, before the first word."""
        if self._passages is None:
            return None
        return ChatChunk(**self._head, choices=[], citations=sources(self._passages[: started.prompts[0].num_passages]))

    def chunk(self, piece: Piece) -> ChatChunk | None:
        """None where nothing but white space has come yet, with which no message begins."""
        is_first = piece.index not in self._begun
        text = piece.text.lstrip() if is_first else piece.text
        tokens = (*self._blank.pop(piece.index, ()), *piece.logprobs)
        if is_first and not (text or piece.finish_reason):
            self._blank[piece.index] = tokens
            return None
        self._begun.add(piece.index)
        delta = Delta(role="assistant" if is_first else None, content=text)
        logprobs = chat_logprobs(self.request, tokens)
        choice = ChunkChoice(index=piece.index, delta=delta, logprobs=logprobs, finish_reason=piece.finish_reason)
        return ChatChunk(**self._head, choices=[choice])

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self._head, choices=[], usage=usage)


def chat_logprobs(request: ChatRequest, tokens: tuple[TokenLogprob, ...]) -> ChatLogprobs | None:
    if not request.logprobs:
        return None
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(**_fields(token), top_logprobs=[TopLogprob(**_fields(likely)) for likely in token.top])
            for token in tokens
        ]
    )


def _choice(request: ChatRequest, index: int, choice: Choice) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=AssistantMessage(content=choice.text.lstrip()),
        logprobs=chat_logprobs(request, choice.logprobs),
        finish_reason=choice.finish_reason,
    )


def _fields(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes) or None}
