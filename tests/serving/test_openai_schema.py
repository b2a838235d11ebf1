import pytest
from pydantic import ValidationError

from app.serving.openai_schema import CompletionRequest, RagRequest

BASE = {"model": "pacos", "prompt": "hello"}


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
    inert = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "logit_bias": {}, "presence_penalty": 0.0}
    CompletionRequest.model_validate(BASE | inert | {"seed": None, "user": "me"})
    for key, value in {
        "n": 2,
        "best_of": 3,
        "echo": True,
        "logprobs": 0,
        "presence_penalty": 0.1,
        "suffix": "x",
    }.items():
        with pytest.raises(ValidationError, match=f"not supported by this server: {key}"):
            CompletionRequest.model_validate(BASE | {key: value})
    with pytest.raises(ValidationError, match="not supported by this server: n"):
        CompletionRequest.model_validate(BASE | {"n": True})


def test_unknown_parameters_are_refused_all_by_name():
    with pytest.raises(ValidationError, match="not supported by this server: min_p, typical"):
        CompletionRequest.model_validate(BASE | {"min_p": 0.1, "typical": 1})
    with pytest.raises(ValidationError, match="not supported by this server: stream"):
        RagRequest.model_validate({"question": "why?", "stream": True})


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": 3}, {"prompt": [1, "a"]}, {"prompt": [True]}, {"prompt": [1.5]}, {"prompt": None}, {"prompt": {}},
        {"prompt": "\ud800"}, {"model": "\ud800"}, {"model": 1}, {"max_tokens": "5"}, {"max_tokens": 0},
        {"max_tokens": True}, {"temperature": -0.1}, {"temperature": 2.5}, {"temperature": float("nan")},
        {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"seed": "a"}, {"seed": 1.5}, {"stop": ""}, {"stop": [""]},
        {"stop": ["a"] * 5}, {"stop": 3}, {"stream": "yes"}, {"stream_options": {"include_usage": True}},
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
        {"top_p": 0.5}, {"top_k": 5}, {"seed": 1}, {"stop": "x"},
    ]  # fmt: skip
    identities = [str(CompletionRequest.model_validate(BASE | variant).to_request().identity()) for variant in variants]
    assert len(set(identities)) == len(variants)
