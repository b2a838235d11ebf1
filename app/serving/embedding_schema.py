"""The wire of `/v1/embeddings`, in OpenAI's shapes."""

import base64
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from app.serving.messages import Embeddings
from app.serving.openai_schema import WHOLE, Text, Wire, WireRequest

MOST_TEXTS = 2048
"""In one request, as in OpenAI's API."""


def embedder_name(name: str) -> str:
    """The embedder's, in an API whose base model is `name`."""
    return f"{name}-embedder"


def _check_input(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError(
            "input_type",
            "must be a string or a list of 1 to {most} strings, none of them empty; token ids are not taken, since "
            "the embedder has a tokenizer of its own",
            {"most": MOST_TEXTS},
        ) from None


_NonEmpty = Annotated[Text, Field(min_length=1)]
_Texts = Annotated[list[_NonEmpty], Field(min_length=1, max_length=MOST_TEXTS)]


class EmbeddingRequest(WireRequest):
    model: Annotated[Text, Field(examples=["pacos-embedder"])]
    input: Annotated[_NonEmpty | _Texts, WrapValidator(_check_input), Field(examples=["What is hay?"])]
    """A text or several; each gets a vector of length 1."""
    encoding_format: Literal["float", "base64"] = "float"
    """base64: of the vector's fp32 values, least significant byte first."""
    dimensions: Annotated[int, Field(ge=1), WHOLE] | None = None
    """Refused unless it is what the embedder has."""
    user: Text | None = None
    """Accepted, and not used."""

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class Embedding(Wire):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Wire):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Wire):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def embedding_response(request: EmbeddingRequest, embeddings: Embeddings) -> EmbeddingResponse:
    vectors = embeddings.vectors.astype("<f4")
    is_float = request.encoding_format == "float"
    encoded = vectors.tolist() if is_float else [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
    return EmbeddingResponse(
        data=[Embedding(index=index, embedding=embedding) for index, embedding in enumerate(encoded)],
        model=request.model,
        usage=EmbeddingUsage(prompt_tokens=embeddings.num_tokens, total_tokens=embeddings.num_tokens),
    )
