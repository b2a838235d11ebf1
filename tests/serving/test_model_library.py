"""Deltas that come and go while requests run: from folders and from the registry."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from app.config import ApplicationConfig
from app.config.methods import AdapterConfig, ExtraBlockConfig, FreezeConfig, LoraConfig, PrefixConfig
from app.data.tokenization import Tokenizer
from app.errors import UserError
from app.methods.delta import apply_delta, read_delta
from app.models.checkpoints import load_decoder
from app.serving.generator import GeneratorDeployment
from app.serving.messages import Completion, GenerateRequest, Refusal

PROMPT = "An adult alpaca"


@pytest.fixture
def deploy(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GeneratorDeployment]]:
    monkeypatch.setattr("app.serving.model_library._GRACE_S", 0.1)
    made = []

    def make(**values) -> GeneratorDeployment:
        values = {
            "model": str(model_dir),
            "precision": "fp32",
            "threads": 1,
            "max_batch_size": 8,
            "refresh_s": 0.2,
        } | values
        made.append(GeneratorDeployment(ApplicationConfig.model_validate({"generator": values})))
        return made[-1]

    yield make
    for deployment in made:
        deployment.__del__()


def ask(generator: GeneratorDeployment, name: str, **values) -> Completion | Refusal:
    full_name = f"pacos:{name}" if name else "pacos"
    values = {"max_tokens": 12, "temperature": 0.0} | values
    return asyncio.run(generator.complete(GenerateRequest(full_name, (PROMPT,), **values)))


def text(generator: GeneratorDeployment, name: str) -> str:
    answer = ask(generator, name)
    assert isinstance(answer, Completion), answer
    return answer.choices[0].text


@torch.inference_mode()
def alone(model_dir: Path, delta: Path, tokenizer: Tokenizer) -> str:
    """What the model with `delta` alone answers, token by token without an engine."""
    model = load_decoder(model_dir)
    apply_delta(model, read_delta(delta))
    ids = tokenizer.encode(PROMPT)
    for _ in range(12):
        ids.append(int(model.head(model(torch.tensor([ids]))[0, -1]).argmax()))
    return tokenizer.decode(ids[-12:])


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_deltas_of_all_kinds_answer_as_each_does_alone_and_share_the_bases_engine(
    deploy, make_delta, model_dir, tokenizer
):
    methods = {
        "lora": LoraConfig(rank=2), "adapter": AdapterConfig(size=4), "prefix": PrefixConfig(length=3),
        "frozen": FreezeConfig(frozen=("embeddings", "blocks.0")),
    }  # fmt: skip
    deltas = {name: make_delta(name, method) for name, method in methods.items()}
    generator = deploy(deltas={name: str(folder) for name, folder in deltas.items()})

    async def all_at_once() -> list[Completion | Refusal]:
        requests = [GenerateRequest(f"pacos:{name}", (PROMPT,), max_tokens=12, temperature=0.0) for name in deltas]
        return await asyncio.gather(*map(generator.complete, requests))

    texts = [answer.choices[0].text for answer in asyncio.run(all_at_once())]
    assert texts == [alone(model_dir, folder, tokenizer) for folder in deltas.values()]
    assert len({*texts, text(generator, "")}) == 5, "each its own answer"
    assert list(asyncio.run(generator.stats())) == ["pacos", "pacos:frozen"], "one trains the base's own weights"
    lengths = {info.name: info.context_length for info in asyncio.run(generator.models())}
    assert lengths["pacos:prefix"] == lengths["pacos"] - 3


def test_as_many_extra_blocks_are_served_as_the_settings_say(deploy, make_delta, model_dir, tokenizer):
    folder = make_delta("taller", ExtraBlockConfig(count=2))
    with pytest.raises(UserError, match=r"room for 1: .*generator\.max_extra_blocks=2"):
        deploy(deltas={"taller": str(folder)})
    generator = deploy(deltas={"taller": str(folder)}, max_extra_blocks=2)
    assert text(generator, "taller") == alone(model_dir, folder, tokenizer)


def test_a_promoted_delta_answers_soon_and_no_request_fails_meanwhile(deploy, make_delta, registry):
    first, second = (make_delta(f"v{seed}", LoraConfig(rank=2), seed=seed) for seed in (1, 2))
    registry("followed", first)
    generator = deploy(deltas={"live": "models:/followed@production", "old": str(first), "new": str(second)})
    old, new = text(generator, "old"), text(generator, "new")
    assert text(generator, "live") == old != new
    answers: list[Completion | Refusal] = []
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            answers.append(ask(generator, "live"))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    registry("followed", second)
    until(lambda: text(generator, "live") == new)
    ended.set()
    for thread in threads:
        thread.join()
    assert {answer.choices[0].text for answer in answers if isinstance(answer, Completion)} >= {old}
    assert all(isinstance(answer, Completion) and answer.choices[0].text in (old, new) for answer in answers)


def test_a_model_with_an_engine_of_its_own_is_replaced_under_load_too(deploy, make_delta, registry):
    first, second = (
        make_delta(f"v{seed}", FreezeConfig(frozen=("embeddings", "blocks.0")), seed=seed) for seed in (1, 2)
    )
    registry("whole", first)
    generator = deploy(deltas={"live": "models:/whole@production"})
    old = text(generator, "live")
    front = generator._library.get("pacos:live").front
    found = generator._library.get("pacos:live")
    registry("whole", second)
    until(lambda: text(generator, "live") != old)
    until(lambda: not front.is_alive)
    # a request that found the old one before, and comes to its engine only now
    generator._library.get = lambda name, get=generator._library.get, stale=[found]: stale.pop() if stale else get(name)
    assert text(generator, "live") != old
    generator.check_health()


def test_a_broken_delta_is_refused_and_the_old_one_stays(deploy, make_delta, registry, damage, caplog):
    good = make_delta("good", LoraConfig(rank=2), seed=1)
    registry("breaking", good)
    generator = deploy(deltas={"live": "models:/breaking@production"}, refresh_s=1000)
    old = text(generator, "live")
    bad = make_delta("bad", LoraConfig(rank=2), seed=2)
    registry("breaking", bad)
    damage(bad)
    generator._library.follow_aliases()
    (line,) = [record.getMessage() for record in caplog.records if "stays" in record.getMessage()]
    assert line.startswith("pacos:live stays models:/breaking/1: ") and "damaged" in line
    assert text(generator, "live") == old


def test_a_replica_that_starts_while_the_promoted_one_is_broken_answers_with_the_one_before(
    deploy, make_delta, registry, damage, caplog
):
    good, bad = (make_delta(name, LoraConfig(rank=2), seed=seed) for name, seed in (("earlier", 11), ("later", 12)))
    registry("restarted", good)
    registry("restarted", bad)
    damage(bad)
    generator = deploy(deltas={"live": "models:/restarted@production", "good": str(good)}, refresh_s=0.05)
    assert text(generator, "live") == text(generator, "good")
    until(lambda: "pacos:live stays models:/restarted/1" in caplog.text)
    time.sleep(0.3)
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 2, "when it starts, and once when it looks again"
    assert told[0].startswith("pacos:live is models:/restarted/1, which was promoted before models:/restarted/2: ")
    registry("first-broken", bad, promoted=False)
    with pytest.raises(UserError, match="no alias 'production'"):
        deploy(deltas={"live": "models:/first-broken@production"})


def test_a_registered_delta_is_loaded_when_it_is_first_asked_for(deploy, make_delta, registry):
    folder = make_delta("late", LoraConfig(rank=2), seed=4)
    generator = deploy(load_registered=True, deltas={"reference": str(folder)})
    unknown = ask(generator, "first-asked")
    assert isinstance(unknown, Refusal) and unknown.status == 404
    registry("first-asked", folder)
    until(lambda: isinstance(ask(generator, "first-asked"), Completion))
    assert text(generator, "first-asked") == text(generator, "reference")
    assert "pacos:first-asked" in [info.name for info in asyncio.run(generator.models())]
    for name in ("../x", "a@b", "x'or'", "", "a/b"):
        assert ask(generator, name or " ").status == 404
    assert ask(deploy(), "first-asked").status == 404, "not without load_registered"


def test_a_registered_delta_of_the_bases_own_weights_has_to_be_listed(deploy, make_delta, registry):
    registry("own-weights", make_delta("own-weights", FreezeConfig(frozen=("embeddings", "blocks.0")), seed=4))
    refused = ask(deploy(load_registered=True), "own-weights")
    assert refused.status == 503 and "list it in generator.deltas" in refused.message
    listed = deploy(load_registered=True, deltas={"own-weights": "models:/own-weights@production"})
    assert isinstance(ask(listed, "own-weights"), Completion)


def test_a_registered_delta_that_cannot_be_loaded_is_not_tried_at_each_request(deploy, monkeypatch):
    generator, looked = deploy(load_registered=True, refresh_s=60), []

    def away(reference, tracking):
        looked.append(reference)
        raise UserError("the store does not answer")

    monkeypatch.setattr("app.serving.model_library.version_now", away)
    for _ in range(3):
        refused = ask(generator, "somewhere")
        assert refused.status == 503 and "the store does not answer" in refused.message
    assert len(looked) == 1


def test_what_was_unloaded_for_another_is_loaded_again(deploy, make_delta, registry, model_dir, tokenizer, caplog):
    folders = [make_delta(f"delta-{seed}", LoraConfig(rank=4), seed=seed) for seed in range(3)]
    for number, folder in enumerate(folders):
        registry(f"many-{number}", folder)
    size = sum(weight.numel() * 4 for weight in read_delta(folders[0]).weights.values())
    caplog.set_level(logging.INFO, "ray.serve")
    generator = deploy(load_registered=True, max_delta_bytes=2 * size + 64, refresh_s=1000)
    texts = [text(generator, f"many-{number}") for number in range(3)]
    assert asyncio.run(generator.stats())["pacos"]["deltas"] == 2
    assert [text(generator, f"many-{number}") for number in range(3)] == texts
    unloaded = generator._library.get("pacos:many-0")
    assert unloaded.delta not in unloaded.front._engine.deltas.loaded
    promoted = make_delta("delta-3", LoraConfig(rank=4), seed=3)
    registry("many-0", promoted)
    generator._library.follow_aliases()
    assert generator._library.get("pacos:many-0").delta == read_delta(promoted).hash
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert "pacos:many-0 is models:/many-0/2 now" in caplog.text
    assert text(generator, "many-0") == alone(model_dir, promoted, tokenizer)
    pinned = {f"pinned-{number}": str(folder) for number, folder in enumerate(folders)}
    with pytest.raises(UserError, match=r"max_delta_bytes=\d+.*raise it"):
        deploy(max_delta_bytes=2 * size + 64, deltas=pinned)
