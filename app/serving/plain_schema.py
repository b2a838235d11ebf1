"""The wire of the plain routes: a text in, a text out. Knows no models and no Ray."""

from typing import Annotated, Literal

from pydantic import Field

from app.data.records import Message
from app.serving.messages import ChatPrompt, Completion, GenerateRequest
from app.serving.openai_schema import AnswerRequest, Text, Usage, Wire, usage


class PlainRequest(AnswerRequest):
    prompt: Annotated[Text, Field(min_length=1, examples=["What is hay?"])]

    def to_request(self, *, model: str, in_template: bool) -> GenerateRequest:
        """`in_template`: the prompt is an instruction, and put into the model's own template."""
        return GenerateRequest(
            model=model,
            prompts=(ChatPrompt((Message("user", self.prompt),)) if in_template else self.prompt,),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(self.stop),
        )


class PlainResponse(Wire):
    text: str
    model: str
    finish_reason: Literal["stop", "length"]
    usage: Usage


def plain_response(model: str, completion: Completion, *, in_template: bool) -> PlainResponse:
    (choice,) = completion.choices
    return PlainResponse(
        text=choice.text.strip() if in_template else choice.text,
        model=model,
        finish_reason=choice.finish_reason,
        usage=usage(completion.prompt_tokens, completion.completion_tokens),
    )
