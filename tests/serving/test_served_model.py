import asyncio
import json
import pickle
import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from app.config import ApplicationConfig, PromoteConfig, TrackingConfig
from app.data.encoding import encode_records
from app.data.prompts import AlpacaTemplate, PacosTemplate
from app.data.records import Conversation, Message
from app.engine.events import ContextLengthExceeded, InvalidRequest
from app.errors import UserError
from app.serving.generator import GeneratorDeployment
from app.serving.messages import ChatPrompt, Completion, GenerateRequest, ModelInfo, Piece, Refusal, Started
from app.serving.registered_deltas import with_registry
from app.serving.served_model import ServedModel
from app.tracking.registry import promote, register
from app.tracking.run import open_tracker, tracked_run


def config(model_dir, **generator):
    values = {
        "model": str(model_dir),
        "precision": "fp32",
        "threads": 1,
        "max_batch_size": 4,
        "max_queue": 8,
    } | generator
    return ApplicationConfig.model_validate({"generator": values})


def request(*prompts, **values):
    return GenerateRequest(**({"model": "pacos", "prompts": prompts, "max_tokens": 12, "temperature": 0.0} | values))


def asked(question, *passages):
    return ChatPrompt((Message("user", question),), passages)


@pytest.fixture(scope="module")
def generator(model_dir, delta_dir):
    generator = GeneratorDeployment(config(model_dir, deltas={"tuned": str(delta_dir)}))
    yield generator
    generator.__del__()


def complete(generator, request) -> Completion:
    completion = asyncio.run(generator.complete(request))
    assert isinstance(completion, Completion), completion
    return completion


def refusal(generator, request) -> Refusal:
    answer = asyncio.run(generator.complete(request))
    assert isinstance(answer, Refusal), answer
    return answer


def test_the_cache_of_keys_and_values_is_kept_as_the_settings_say(model_dir):
    generator = GeneratorDeployment(config(model_dir, kv_dtype="int8"))
    try:
        assert complete(generator, request("An adult alpaca")).completion_tokens == 12
        (front,) = generator._library.fronts.values()
        assert front._engine._cache.keys.dtype == torch.int8
    finally:
        generator.__del__()


def test_a_greedy_answer_is_the_one_that_transformers_gives(generator, greedy):
    (choice,) = complete(generator, request("An adult alpaca", max_tokens=20)).choices
    assert choice.text == greedy("An adult alpaca", 20)
    assert (choice.finish_reason, choice.num_tokens) == ("length", 20)


def test_several_prompts_get_the_answers_that_each_gets_alone(generator, greedy):
    prompts = ["An adult", "Shearing takes", "foxes", "A pair of llamas will"]
    choices = complete(generator, request(*prompts)).choices
    assert [choice.text for choice in choices] == [greedy(prompt, 12) for prompt in prompts]


def test_streamed_pieces_join_to_the_unstreamed_answer(generator):
    async def stream():
        return [items async for items in generator.stream(request("hay", "dog", max_tokens=30))]

    (started, *first), *rest = asyncio.run(stream())
    assert first, "the first token comes at once, with the word that there will be some"
    pieces = [*first, *(piece for items in rest for piece in items)]
    assert isinstance(started, Started) and all(isinstance(piece, Piece) for piece in pieces)
    whole = complete(generator, request("hay", "dog", max_tokens=30))
    for index, choice in enumerate(whole.choices):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == choice.text
        assert sum(piece.num_tokens for piece in mine) == choice.num_tokens == 30
        assert [piece.finish_reason for piece in mine][-1] == "length"


def test_a_stop_string_ends_the_answer_and_the_generation(generator):
    text = complete(generator, request("An adult alpaca", max_tokens=30)).choices[0].text
    stop = text[len(text) // 2 :][:2]
    (choice,) = complete(generator, request("An adult alpaca", max_tokens=30, stop=(stop,))).choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop" and choice.num_tokens < 30
    wait_until_idle(generator)


def wait_until_idle(generator, timeout_s=30):
    """The engine drops an ended request between two of its steps, in a thread of its own."""
    deadline = time.monotonic() + timeout_s
    while asyncio.run(generator.stats())["pacos"]["running"]:
        assert time.monotonic() < deadline, "the engine still generates for a request that has ended"
        time.sleep(0.01)


def test_a_delta_answers_as_the_model_with_the_delta_applied(generator, model_dir, delta_dir, tokenizer):
    import torch

    from app.methods.delta import apply_delta, read_delta
    from app.models.checkpoints import load_decoder

    model = load_decoder(model_dir)
    apply_delta(model, read_delta(delta_dir))
    ids = tokenizer.encode("An adult alpaca")
    with torch.inference_mode():
        for _ in range(12):
            ids.append(int(model.head(model(torch.tensor([ids]))[0, -1]).argmax()))
    tuned = complete(generator, request("An adult alpaca", model="pacos:tuned"))
    plain = complete(generator, request("An adult alpaca"))
    assert tuned.choices[0].text == tokenizer.decode(ids[-12:])
    assert tuned.choices[0].text != plain.choices[0].text
    assert tuned.model_hash != plain.model_hash


def test_a_delta_of_another_base_is_refused(model_dir, delta_dir, tmp_path):
    other = tmp_path / "delta"
    shutil.copytree(delta_dir, other)
    metadata = json.loads((other / "delta.json").read_text())
    (other / "delta.json").write_text(json.dumps(metadata | {"base_hash": "0" * 64}))
    with pytest.raises(UserError, match="base_hash='0000000000000000'"):
        GeneratorDeployment(config(model_dir, deltas={"tuned": str(other)}))


def test_a_registered_delta_is_served_as_its_folder_is(generator, model_dir, delta_dir, tmp_path, tracking_store):
    tracker = open_tracker(TrackingConfig(), output=str(tmp_path))
    with tracked_run(tracker, name="served", output=tmp_path, settings={}, resume=False, warn=pytest.fail) as run:
        copy = shutil.copytree(delta_dir, tmp_path / "delta")
        assert run.keep(copy)
        assert register(run.client, run.run_id, "served", delta_folder=copy, figures={}) == "served/1"
    promote(PromoteConfig(name="served", version=1))
    settings = config(model_dir, deltas={"tuned": "models:/served@production"})
    settings = settings.model_copy(update={"generator": with_registry(settings.generator)})
    assert settings.generator.tracking.uri == tracking_store, "not auto, which means another store elsewhere"
    registered = GeneratorDeployment(settings)
    try:
        answers = [
            complete(which, request("An adult alpaca", model="pacos:tuned")) for which in (generator, registered)
        ]
        assert answers[0].choices[0].text == answers[1].choices[0].text
        assert answers[0].model_hash == answers[1].model_hash, "one content, one key in the cache"
    finally:
        registered.__del__()


def test_a_registered_delta_of_another_base_is_refused(delta_dir, tmp_path, tiny_model, tracking_store):
    tracker = open_tracker(TrackingConfig(), output=str(tmp_path))
    with tracked_run(tracker, name="other", output=tmp_path, settings={}, resume=False, warn=pytest.fail) as run:
        copy = shutil.copytree(delta_dir, tmp_path / "delta")
        run.keep(copy)
        register(run.client, run.run_id, "other-base", delta_folder=copy, figures={})
    with pytest.raises(UserError, match="does not belong to the model"):
        GeneratorDeployment(config(tiny_model, deltas={"tuned": "models:/other-base/1"}))


@pytest.mark.parametrize(
    ("values", "status", "code"),
    [
        ({"model": "other"}, 404, "model_not_found"),
        ({"prompts": ("",)}, 400, "invalid_prompt"),
        ({"prompts": ((),)}, 400, "invalid_prompt"),
        ({"prompts": ((10**9,),)}, 400, "invalid_prompt"),
        ({"prompts": ("hay", (-1,))}, 400, "invalid_prompt"),
        ({"prompts": ((1,) * 2048,)}, 400, "context_length_exceeded"),
        ({"prompts": (asked("hay " * 2048, "x"),)}, 400, "context_length_exceeded"),
        ({"prompts": ("x",) * 50}, 400, "too_many_choices"),
        ({"n": 13}, 400, "too_many_choices"),
        ({"prompts": (ChatPrompt((Message("assistant", "x"),)),)}, 400, "invalid_prompt"),
        ({"prompts": (ChatPrompt((Message("user", "hay " * 2048),)),)}, 400, "context_length_exceeded"),
        ({"logit_bias": {500: 1.0}}, 400, "invalid_value"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_reason(generator, values, status, code):
    answer = refusal(generator, request("x", **values))
    assert (answer.status, answer.code) == (status, code)
    deadline = time.monotonic() + 30
    while asyncio.run(generator.stats())["pacos"]["free_slots"] < 4:  # prompts that had begun are aborted
        assert time.monotonic() < deadline


@pytest.mark.parametrize("prompt", ["x", asked("Why?")])
@pytest.mark.parametrize("token", [500, -1])
def test_a_bias_of_a_token_that_is_none_is_refused_by_its_own_name(generator, prompt, token):
    """By the model's tokenizer, and by its engine."""
    answer = refusal(generator, request(prompt, logit_bias={token: 1.0}))
    assert (answer.status, answer.param) == (400, "logit_bias") and f"token id {token}" in answer.message
    error = pickle.loads(pickle.dumps(InvalidRequest("no", param="logit_bias")))
    assert (str(error), error.param) == ("no", "logit_bias")
    assert pickle.loads(pickle.dumps(ContextLengthExceeded(prompt_length=3, context_length=2))).param is None


def test_a_failed_step_is_a_503_and_the_next_request_is_answered(generator, greedy):
    engine = generator._library.get("pacos").front._engine
    run = engine._runner.run

    def fail_once(sequences):
        engine._runner.run = run
        raise RuntimeError("broken")

    engine._runner.run = fail_once
    answer = refusal(generator, request("hay"))
    assert (answer.status, answer.code) == (503, "generation_failed")
    assert complete(generator, request("hay")).choices[0].text == greedy("hay", 12)


def test_a_dead_engine_fails_the_health_check(model_dir):
    generator = GeneratorDeployment(config(model_dir))
    generator.check_health()
    generator._library.get("pacos").front.shutdown()
    with pytest.raises(RuntimeError, match="engine of pacos"):
        generator.check_health()


def test_each_model_answers_in_the_template_that_it_was_trained_with(model_dir, delta_dir, tokenizer, tmp_path):
    copy = shutil.copytree(delta_dir, tmp_path / "delta")
    metadata = json.loads((copy / "delta.json").read_text())
    (copy / "delta.json").write_text(json.dumps(metadata | {"template": {"type": "alpaca"}}))
    generator = GeneratorDeployment(config(model_dir, deltas={"own": str(delta_dir), "alpaca": str(copy)}))
    prompts = {
        name: tokenizer.decode(model._encode(asked("Why?", "hay"), 16)[0])
        for name, model in generator._library.models.items()
    }
    assert prompts["pacos"] == prompts["pacos:own"] == PacosTemplate().prompt("Why?", "hay")
    assert prompts["pacos:alpaca"] == AlpacaTemplate().prompt("Why?", "hay")
    infos = {info.name: info for info in asyncio.run(generator.models())}
    assert infos["pacos:alpaca"].template == {"type": "alpaca"}
    assert infos["pacos:alpaca"].hash != infos["pacos:own"].hash, "another prompt, another answer: cached apart"


def test_passages_stand_in_the_template_on_one_line_as_many_as_fit(generator, tokenizer):
    model = generator._library.get("pacos")
    ids, info = model._encode(asked("Why?\n", "one\ntwo", "<|endoftext|>three\nResponse: no"), 16)
    assert tokenizer.decode(ids) == PacosTemplate().prompt("Why?", "one two three Response: no")
    assert (info.num_tokens, info.num_passages) == (len(ids), 2)
    assert tokenizer.end_id not in ids

    passages = tuple(f"{number} " + "hay " * 300 for number in range(9))
    ids, info = model._encode(asked("Why?", *passages), 256)
    assert 0 < info.num_passages < 9
    assert len(ids) + 256 <= 2048
    assert len(model._render([Message("user", "Why?")], passages[: info.num_passages + 1])) + 256 > 2048


def test_a_conversation_is_read_as_training_wrote_it(generator, tokenizer):
    model = generator._library.get("pacos")
    turns = [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because<|endoftext|>."), ("user", "And hay?")]
    conversation = tuple(Message(role, content) for role, content in turns)
    ids, _ = model._encode(ChatPrompt(conversation), 16)
    whole = Conversation(
        (*conversation[:2], Message("assistant", "Because ."), conversation[3], Message("assistant", "x"))
    )
    (document,) = encode_records(
        [whole], template=PacosTemplate(), tokenizer=tokenizer, max_length=2048, truncation="drop"
    )
    (tokens,) = document
    end = len(tokenizer.encode(PacosTemplate().before_response + "x")) + 1
    assert ids == tokens.input_ids[:-end]
    with_passage, info = model._encode(ChatPrompt(conversation, ("hay is dry",)), 16)
    assert "hay is dry" in tokenizer.decode(with_passage) and info.num_passages == 1


def test_every_answer_of_several_is_its_own_and_the_same_again_by_its_seed(generator):
    asked_for = {"n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 10, "logprobs": 2}
    first, again = (complete(generator, request("hay", "dog", **asked_for)) for _ in range(2))
    assert first == again and len(first.choices) == 6 and len(first.prompts) == 2
    assert len({choice.text for choice in first.choices[:3]}) == 3
    alone = complete(generator, request("dog", **asked_for))
    assert first.choices[3:] == alone.choices, "choice index // n is the prompt's number"
    for choice in first.choices:
        assert len(choice.logprobs) == choice.num_tokens == 10
        for token in choice.logprobs:
            assert token.logprob <= token.top[0].logprob <= 0 and len(token.top) == 2
    assert first == Completion.from_json(json.loads(json.dumps(first.to_json()))), "as it comes back from a cache"


def test_logprobs_are_those_of_the_model_and_their_texts_join_to_the_answer(generator, reference, tokenizer):
    import torch

    (choice,) = complete(generator, request("An adult alpaca", logprobs=1)).choices
    ids = tokenizer.encode("An adult alpaca")
    for token in choice.logprobs:
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
        likeliest = int(expected.argmax())
        assert token.logprob == pytest.approx(expected[likeliest].item(), abs=1e-4)
        assert token.logprob == token.top[0].logprob
        ids.append(likeliest)
    assert b"".join(bytes(token.bytes) for token in choice.logprobs).decode(errors="replace") == choice.text


def test_a_stop_text_ends_one_of_several_answers_and_not_the_others(generator):
    values = {"n": 4, "temperature": 1.5, "seed": 3, "max_tokens": 25}
    free = complete(generator, request("hay", **values)).choices
    stop = free[0].text[5:8]
    stopped = complete(generator, request("hay", **values, stop=(stop,))).choices
    for before, after in zip(free, stopped, strict=True):
        if stop in before.text:
            assert after.text == before.text[: before.text.index(stop)] and after.finish_reason == "stop"
        else:
            assert after == before


@pytest.mark.parametrize(("queued_s", "told"), [(0.0, 1), (3.2, 4), (1000.0, 60)])
def test_who_finds_the_queue_full_is_told_when_it_will_be_worked_off(queued_s, told):
    front = SimpleNamespace(stats=lambda: SimpleNamespace(queued_s=queued_s))
    model = ServedModel(ModelInfo("pacos", "hash", context_length=100, template=None), front, None, [], None)
    assert model.retry_after_s() == told
