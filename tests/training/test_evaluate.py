"""`pacos evaluate`: figures of one model, and of deltas side by side."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from app.config import BitFitConfig, EvaluateConfig, LoraConfig, MethodConfig, PrefixConfig
from app.data.batches import Batch
from app.data.shards import COLUMNS, read_manifest
from app.data.tokenization import load_tokenizer, save_tokenizer
from app.errors import UserError
from app.methods import apply_method
from app.methods.delta import Delta, read_delta, write_delta
from app.models.checkpoints import load_decoder, save_decoder, weights_hash
from app.training import loop
from app.training.answers import first_exchanges
from app.training.evaluate import (
    Candidate,
    EvaluationPlan,
    _evaluate_one,
    evaluate,
    plan_evaluation,
    plot_file,
    score_batch,
    short_names,
    write_evaluations,
)
from app.training.optimizer import trained_parameters

METHODS: dict[str, MethodConfig] = {"lora": LoraConfig(rank=4), "bitfit": BitFitConfig()}


def make_delta(folder: Path, model_folder: Path, method: MethodConfig, *, template: str = "pacos") -> str:
    """A delta whose weights were moved at random, as training would."""
    model = load_decoder(model_folder)
    apply_method(model, method)
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: p.detach() + 0.02 * torch.randn(p.shape, generator=draw) for name, p in trained_parameters(model).items()
    }
    metadata = {
        "base": str(model_folder),
        "base_hash": weights_hash(model_folder),
        "tokenizer_hash": load_tokenizer(model_folder).fingerprint(),
        "template": {"type": template},
    }
    folder.mkdir(parents=True)
    write_delta(folder, Delta(method, weights, metadata))
    return str(folder)


def settings(data: Path, model: Path, **more: object) -> EvaluateConfig:
    values = {"data": str(data), "model": str(model), "workers": {"cpus": 0.5}, "answers": 0, **more}
    return EvaluateConfig.model_validate(values)


@pytest.mark.ray
def test_deltas_are_compared_with_the_model_in_one_table_and_plot(
    small_data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = [make_delta(tmp_path / name / "delta", tiny_model, method) for name, method in METHODS.items()]
    read: list[Path] = []
    monkeypatch.setattr("app.training.evaluate.read_delta", lambda folder: read.append(folder) or read_delta(folder))
    config = settings(small_data, tiny_model, deltas=deltas, answers=9, samples=2, batch_size=4, answer_tokens=12)
    config = config.model_copy(update={"output": str(tmp_path / "figures.json")})
    seen: list[tuple[int, int, str]] = []
    results = evaluate(plan_evaluation(config), progress=lambda *shown: seen.append(shown))
    write_evaluations(config, results)

    assert [result.name for result in results] == [tiny_model.name, "lora", "bitfit"]
    assert [str(folder) for folder in read] == deltas, "each delta's weights are read once"
    assert len({result.loss for result in results}) == 3
    assert all(result.answers == 9 and len(result.samples) == 2 for result in results)
    rows = read_manifest(str(small_data)).num_rows("validation")
    assert seen[-1] == (3 * (rows + 9), 3 * (rows + 9), "bitfit")
    stored = json.loads((tmp_path / "figures.json").read_text())
    assert [row["loss"] for row in stored["results"]] == [result.loss for result in results]
    assert plot_file(config).read_bytes().startswith(b"\x89PNG")
    # one delta alone, in other batches and on one worker: the same figures
    alone = settings(small_data, tiny_model, delta=deltas[1], answers=9, batch_size=16, answer_tokens=12)
    (again,) = evaluate(plan_evaluation(alone))
    assert again.loss == pytest.approx(results[2].loss, rel=1e-6)
    assert again.bits_per_byte == pytest.approx(results[2].bits_per_byte, rel=1e-6)
    assert again.rouge_l == pytest.approx(results[2].rouge_l) and again.exact_match == results[2].exact_match
    assert again.samples[:2] == results[2].samples


def columns_of(data: Path, split: str, rows: slice) -> dict[str, np.ndarray]:
    table = read_manifest(str(data)).read(split)
    return {name: np.array([*table[name].to_numpy()[rows], None], dtype=object)[:-1] for name in COLUMNS}


@pytest.mark.ray
def test_only_sums_leave_a_task_and_they_add_up(small_data: Path, tiny_model: Path) -> None:
    config = settings(small_data, tiny_model)
    whole = score_batch(columns_of(small_data, "train", slice(0, 48)), config=config, delta=[])
    assert all(len(values) == 1 and np.isscalar(values[0]) for values in whole.values())
    parts = [
        score_batch(columns_of(small_data, "train", slice(first, last)), config=config, delta=[])
        for first, last in ((0, 5), (5, 47), (47, 48))
    ]
    for name, (total,) in whole.items():
        assert sum(part[name][0] for part in parts) == pytest.approx(total, rel=1e-6)
    means = [math.exp(part["nll"][0] / part["tokens"][0]) for part in parts]
    assert sum(means) / 3 != pytest.approx(math.exp(whole["nll"][0] / whole["tokens"][0]), rel=1e-4)


def test_bits_per_byte_of_a_record_that_is_counted_by_hand(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    """Of a model to which all tokens are equally likely, so that each is worth log2(vocabulary) bits."""
    model, tokenizer = load_decoder(tiny_model), load_tokenizer(tiny_model)
    with torch.no_grad():
        model.token_embedding.weight.zero_()  # the head's too
    save_decoder(tmp_path, model)
    save_tokenizer(tokenizer, tmp_path)
    prompt, response = tokenizer.encode("How often?"), [*tokenizer.encode("Hay, 🦙"), tokenizer.end_id]
    mask = np.arange(len(prompt + response)) >= len(prompt)
    columns = zip(COLUMNS, (np.array(prompt + response), mask, np.array([len(mask)])), strict=True)
    config = settings(tmp_path, tmp_path)
    sums = score_batch({name: [column] for name, column in columns}, config=config, delta=[])
    figures = [sums[name][0] for name in ("nll", "tokens", "bytes", "records")]
    monkeypatch.setattr("app.training.evaluate._sums", lambda *args, **options: figures)
    plan = EvaluationPlan(config, manifest=None, candidates=[])
    result = _evaluate_one(plan, Candidate("even"), [], advance=lambda count: None)
    assert (result.tokens, result.perplexity) == (len(response), pytest.approx(tokenizer.vocab_size, rel=1e-4))
    assert result.bits_per_byte == pytest.approx(len(response) * math.log2(tokenizer.vocab_size) / 9, rel=1e-5)


def test_evaluating_more_records_takes_no_more_memory(tiny_model: Path) -> None:
    model = load_decoder(tiny_model)
    resident: list[int] = []

    def batches(count: int) -> Iterator[Batch]:
        for _ in range(count):
            resident.append(psutil.Process().memory_info().rss)
            ids = torch.randint(0, 400, (64, 96))
            yield Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids.numel())

    logits_bytes = 64 * 95 * 400 * 4  # of one batch: 10 MB
    loop.evaluate(model, batches(40), precision="fp32")
    assert max(resident[10:]) - resident[10] < 5 * logits_bytes, "30 batches' logits would be 300 MB"


def test_answers_are_asked_for_the_first_prompts(small_data: Path, tiny_model: Path) -> None:
    manifest, tokenizer = read_manifest(str(small_data)), load_tokenizer(tiny_model)
    exchanges = first_exchanges(manifest, "validation", 5)
    assert len(exchanges) == 5
    first_row = manifest.read("validation")["input_ids"].to_numpy()[0].tolist()
    assert exchanges[0]["prompt"] + exchanges[0]["reference"] == first_row
    assert tokenizer.decode(exchanges[0]["prompt"]).rstrip().endswith("Response:")
    rows = manifest.num_rows("validation")
    assert len(first_exchanges(manifest, "validation", 10_000)) == rows
    assert first_exchanges(manifest, "validation", 0) == []


def test_the_delta_that_does_not_fit_is_named(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    good = make_delta(tmp_path / "good/delta", tiny_model, LoraConfig(rank=4))
    other = make_delta(tmp_path / "other/delta", tiny_model, LoraConfig(rank=4), template="alpaca")
    long = make_delta(tmp_path / "long/delta", tiny_model, PrefixConfig(length=8))
    with pytest.raises(UserError, match="other/delta' was trained with the template 'alpaca'"):
        plan_evaluation(settings(small_data, tiny_model, deltas=[good, other]))
    with pytest.raises(UserError, match="long/delta': .*8 of them the method's"):
        plan_evaluation(settings(small_data, tiny_model, deltas=[good, long]))
    damaged = read_delta(Path(good))
    (tmp_path / "damaged/delta").mkdir(parents=True)
    cut = {name: weight[:1] for name, weight in damaged.weights.items()}
    write_delta(tmp_path / "damaged/delta", Delta(damaged.method, cut, damaged.metadata))
    with pytest.raises(UserError, match="damaged/delta': the delta does not fit this model"):
        plan_evaluation(settings(small_data, tiny_model, deltas=[good, str(tmp_path / "damaged/delta")]))


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"delta": "a", "deltas": ["b"]}, "both given"),
        ({"deltas": ["a", "b", "a"]}, "twice"),
        ({"output": "figures.png"}, "must end in .json"),
    ],
)
def test_settings_that_cannot_work_are_told(more: dict[str, object], part: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=part):
        settings(tmp_path, tmp_path, **more)


def test_names_tell_folders_apart_and_no_more() -> None:
    assert short_names(("/r/lora/delta", "/r/bitfit/delta")) == ["lora", "bitfit"]
    assert short_names(("/r/lora/delta",)) == ["lora"]
    assert short_names(("/r/a", "/r/a/b")) == ["a", "a/b"]
    assert short_names(("/r/x/delta", "/s/x/delta")) == ["r/x", "s/x"]
    assert short_names(()) == []
