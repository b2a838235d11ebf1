import json

import pytest
from pydantic import ValidationError

from app.data.records import Message
from app.serving.chat_schema import ChatRequest
from app.serving.messages import ChatPrompt, Piece
from app.serving.openai_schema import CompletionRequest, CompletionStream
from app.serving.retrieval_schema import RagRequest

BASE = {"model": "pacos", "prompt": "hello"}
CHAT = {"model": "pacos", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hello", ("hello",)),
        ([], None),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_every_kind_of_prompt_is_understood(prompt, expected):
    if expected is None:
        with pytest.raises(ValidationError, match="empty list"):
            CompletionRequest.model_validate(BASE | {"prompt": prompt})
    else:
        assert CompletionRequest.model_validate(BASE | {"prompt": prompt}).to_request().prompts == expected


def test_parameters_that_are_not_built_pass_only_with_the_value_that_asks_for_nothing():
    inert = {"best_of": 1, "echo": False, "suffix": ""}
    CompletionRequest.model_validate(BASE | inert | {"seed": None, "user": "me"})
    for key, value in {"best_of": 3, "echo": True, "suffix": "x"}.items():
        with pytest.raises(ValidationError, match=f"not supported by this server: {key}"):
            CompletionRequest.model_validate(BASE | {key: value})
    with pytest.raises(ValidationError, match="not supported by this server: best_of"):
        CompletionRequest.model_validate(BASE | {"best_of": True})


def test_unknown_parameters_are_refused_all_by_name():
    with pytest.raises(ValidationError, match="not supported by this server: mirostat, typical"):
        CompletionRequest.model_validate(BASE | {"mirostat": 0.1, "typical": 1})
    with pytest.raises(ValidationError, match="not supported by this server: tools"):
        ChatRequest.model_validate(CHAT | {"tools": []})
    with pytest.raises(ValidationError, match="not supported by this server: stream"):
        RagRequest.model_validate({"question": "why?", "stream": True})


def test_every_sampling_parameter_reaches_the_engine():
    values = {
        "n": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": 5, "ignore_eos": True,
    }  # fmt: skip
    request = CompletionRequest.model_validate(
        BASE | values | {"max_tokens": 9, "stop": "x", "logprobs": 2, "logit_bias": {"50": -100, "7": 1.5}}
    ).to_request()
    expected = {**values, "max_tokens": 9, "stop": ("x",), "logprobs": 2, "logit_bias": {50: -100, 7: 1.5}}
    assert {name: getattr(request, name) for name in expected} == expected
    chat = ChatRequest.model_validate(
        CHAT | values | {"max_completion_tokens": 9, "stop": "x", "logprobs": True, "top_logprobs": 2}
    ).to_request()
    assert {name: getattr(chat, name) for name in values} == values
    assert (chat.max_tokens, chat.logprobs) == (9, 2)


def test_a_conversation_may_come_in_parts_and_in_any_length():
    parts = [{"type": "text", "text": "Why do "}, {"type": "text", "text": "alpacas hum?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts, "name": "Ana"}]
    request = ChatRequest.model_validate(CHAT | {"messages": messages}).to_request()
    (prompt,) = request.prompts
    assert prompt == ChatPrompt((Message("system", "Be brief."), Message("user", "Why do alpacas hum?")))
    assert request.max_tokens > 100_000 and request.logprobs is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []}, {"messages": "hi"}, {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, {"top_logprobs": 1},
        {"logprobs": 1}, {"max_tokens": 3, "max_completion_tokens": 4}, {"logprobs": True, "top_logprobs": 21},
    ],
)  # fmt: skip
def test_wrong_conversations_are_refused(wrong):
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(CHAT | wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": 3}, {"prompt": [1, "a"]}, {"prompt": [True]}, {"prompt": [1.5]}, {"prompt": None}, {"prompt": {}},
        {"prompt": "\ud800"}, {"model": "\ud800"}, {"model": 1}, {"max_tokens": "5"}, {"max_tokens": 0},
        {"max_tokens": True}, {"temperature": -0.1}, {"temperature": 2.5}, {"temperature": float("nan")},
        {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"seed": "a"}, {"seed": 1.5}, {"stop": ""}, {"stop": [""]},
        {"stop": ["a"] * 5}, {"stop": 3}, {"n": 0}, {"n": True}, {"min_p": 2}, {"presence_penalty": 3},
        {"repetition_penalty": 0}, {"logprobs": 21}, {"logit_bias": {"a": 1}}, {"logit_bias": {"1": 101}},
        {"stream": "yes"}, {"stream_options": {"include_usage": True}},
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_or_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate(BASE | wrong)


def test_only_greedy_or_seeded_requests_count_as_deterministic():
    def request(**values):
        return CompletionRequest.model_validate(BASE | values).to_request()

    assert not request().is_deterministic
    assert request(temperature=0).is_deterministic
    assert request(seed=3).is_deterministic


def test_whatever_shapes_the_answer_changes_the_identity():
    variants = [
        {}, {"prompt": "other"}, {"prompt": [1, 2]}, {"prompt": [[1], [2]]}, {"max_tokens": 3}, {"temperature": 0},
        {"top_p": 0.5}, {"top_k": 5}, {"seed": 1}, {"stop": "x"}, {"n": 2}, {"min_p": 0.1}, {"logprobs": 1},
        {"presence_penalty": 1}, {"frequency_penalty": 1}, {"repetition_penalty": 2}, {"logit_bias": {"1": 1}},
        {"ignore_eos": True},
    ]  # fmt: skip
    identities = [str(CompletionRequest.model_validate(BASE | variant).to_request().identity()) for variant in variants]
    assert len(set(identities)) == len(variants)


def test_an_event_is_one_line_however_lines_are_read():
    from app.serving.ingress import _event

    text = "a\nb\r\x85c\u2028d\u2029\x0b\x0c\x1c\x1e é 🦙"
    chunk = CompletionStream(CompletionRequest.model_validate(BASE)).chunk(Piece(0, text, 3))
    (line, empty) = _event(chunk).splitlines()
    assert empty == "" and "é 🦙" in line
    assert json.loads(line.removeprefix("data: "))["choices"][0]["text"] == text
