"""Runs that share a base, in one plain process: each as it would be alone."""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.config import (
    AdapterConfig,
    ComposedConfig,
    LoraConfig,
    MethodConfig,
    OptimizerConfig,
    PrefixConfig,
    PromptConfig,
    TrainConfig,
)
from app.config.base import Precision
from app.data.batches import Batch, collate
from app.methods import apply_method
from app.models.checkpoints import load_decoder
from app.training import loop
from app.training.checkpointing import Checkpoint
from app.training.loop import Metrics, Plan
from app.training.optimizer import PlainOptimizer, trained_parameters
from app.training.pack import Member, Pack, why_not_packed
from app.training.pieces import Piece, pieces_of

CPU = torch.device("cpu")
METHODS: dict[str, MethodConfig] = {
    "lora": LoraConfig(rank=4),
    "lora_attention": LoraConfig(rank=3, alpha=5, targets=("attn.qkv",)),
    "dora": LoraConfig(rank=2, dora=True, targets=("attn.qkv", "mlp.up")),
    "adapter": AdapterConfig(size=8),
    "prefix": PrefixConfig(length=5),
    "prefix_by_mlp": PrefixConfig(length=5, mlp_width=16),
    "prompt": PromptConfig(length=6),
    "composed": ComposedConfig(parts=(LoraConfig(rank=3), AdapterConfig(size=4), PrefixConfig(length=3))),
}


def plan(number: int, *, steps: int, precision: Precision = "fp32", is_packed: bool = False) -> Plan:
    """Each run with settings of its own."""
    schedule = ("cosine", "linear", "constant")[number % 3]
    return Plan(
        total_steps=steps,
        eval_every=25,
        save_every=1000,
        optimizer=OptimizerConfig(learning_rate=2e-3 + 5e-4 * number, schedule=schedule, weight_decay=0.01 * number),
        precision=precision,
        seed=number,
        is_packed=is_packed,
        label_smoothing=0.1 if number == 1 else 0.0,
    )


def batches(seed: int, start_step: int = 0, *, documents: int = 1) -> Iterator[Batch]:
    """Records of uneven length, `documents` to a row, each run's its own."""
    for step in itertools.count(start_step):
        draw = torch.Generator().manual_seed(1000 * seed + step)
        lengths = torch.randint(4, 20, (3 + seed % 3, documents), generator=draw)
        ids = [torch.randint(0, 20, (int(of_row.sum()),), generator=draw).numpy() for of_row in lengths]
        masks = [torch.cat([torch.arange(int(n)) >= 2 for n in of_row]).numpy() for of_row in lengths]
        yield collate(ids, masks, [of_row.numpy() for of_row in lengths])


def validation(documents: int = 1) -> list[Batch]:
    return list(itertools.islice(batches(99, documents=documents), 3))


@functools.cache
def alone(tiny_model: Path, method: MethodConfig, of_run: Plan, *, documents: int = 1) -> list[Metrics]:
    model = load_decoder(tiny_model)
    torch.manual_seed(of_run.seed)
    apply_method(model, method)
    rows: list[Metrics] = []
    loop.run(
        model,
        PlainOptimizer(model, of_run.optimizer),
        plan=of_run,
        start_step=0,
        batches=batches(of_run.seed, documents=documents),
        validation=lambda: validation(documents),
        report=rows.append,
        save=lambda step, metrics: None,
    )
    return rows


class Runs:
    """A pack with those that are in it."""

    def __init__(self, tiny_model: Path, *, pass_tokens: int = 8192, precision: Precision = "fp32") -> None:
        self.pack = Pack(load_decoder(tiny_model), precision=precision, device=CPU, pass_tokens=pass_tokens)
        self.members: dict[str, Member] = {}
        self.rows: dict[str, list[Metrics]] = {}

    def join(self, name: str, of_run: Plan, *, documents: int = 1, resume: Checkpoint | None = None) -> None:
        self.members[name] = self.pack.new_member(
            name,
            METHODS[name],
            plan=of_run,
            batches=lambda step: batches(of_run.seed, step, documents=documents),
            validation=validation(documents),
            resume=resume,
        )

    def advance(self) -> None:
        """One step of every run; those that are done leave."""
        begun = self.pack.begin([member for member in self.members.values() if not member.has_begun])
        for results in (begun, self.pack.step(list(self.members.values()))):
            for name, metrics in results.items():
                assert isinstance(metrics, dict), metrics
                self.rows.setdefault(name, []).append(metrics)
        self.members = {name: member for name, member in self.members.items() if not member.is_done}

    def finish(self) -> None:
        while self.members:
            self.advance()


def check_same(packed: list[Metrics], expected: list[Metrics], *, within: float = 1e-4) -> None:
    assert len(packed) == len(expected)
    for mine, theirs in zip(packed, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key in ("step", "tokens", "eval_tokens", "learning_rate", "precision"):
            assert mine.get(key) == theirs.get(key)
        for key in {"loss", "eval_loss"} & theirs.keys():
            assert mine[key] == pytest.approx(theirs[key], abs=within), (mine["step"], key)
        if "gradient_norm" in theirs:
            assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=10 * within, abs=within)


@pytest.mark.parametrize(("documents", "pass_tokens"), [(1, 8192), (3, 100)], ids=["one_pass", "packed_rows_in_passes"])
def test_fifty_steps_in_a_pack_are_those_of_each_run_alone(tiny_model: Path, documents: int, pass_tokens: int) -> None:
    runs = Runs(tiny_model, pass_tokens=pass_tokens)
    plans = {name: plan(number, steps=50, is_packed=documents > 1) for number, name in enumerate(METHODS)}
    for name, of_run in plans.items():
        runs.join(name, of_run, documents=documents)
    runs.finish()
    for name, of_run in plans.items():
        expected = alone(tiny_model, METHODS[name], of_run, documents=documents)
        assert abs(expected[0]["eval_loss"] - expected[-1]["eval_loss"]) > 3e-3  # else nothing has been trained
        check_same(runs.rows[name], expected)


def test_runs_join_and_leave_between_steps_and_the_others_notice_nothing(tiny_model: Path) -> None:
    runs = Runs(tiny_model)
    plans = {name: plan(number, steps=12) for number, name in enumerate(METHODS)}
    runs.join("lora", plans["lora"])
    runs.advance()
    runs.join("prefix", plans["prefix"])
    runs.join("adapter", plans["adapter"])
    for _ in range(3):
        runs.advance()
    del runs.members["adapter"]
    runs.join("prompt", plans["prompt"])
    runs.finish()
    assert [row["step"] for row in runs.rows.pop("adapter")] == [0, 1, 2, 3]
    for name, mine in runs.rows.items():
        check_same(mine, alone(tiny_model, METHODS[name], plans[name]))


def test_a_run_goes_on_from_its_checkpoint(tiny_model: Path) -> None:
    of_run = plan(0, steps=12)
    first = Runs(tiny_model)
    first.join("composed", of_run)
    for _ in range(7):
        first.advance()
    optimizer = first.members["composed"].optimizer
    second = Runs(tiny_model)
    second.join("composed", of_run, resume=Checkpoint(7, optimizer.weights(), optimizer.moments()))
    second.finish()
    check_same(first.rows["composed"] + second.rows["composed"], alone(tiny_model, METHODS["composed"], of_run))


def test_updates_of_low_rank_alone_are_those_of_each_run_alone_too(tiny_model: Path) -> None:
    """Where all are LoRAs, one function adds them; of two one leaves some layers as they are."""
    runs = Runs(tiny_model, pass_tokens=100)
    plans = {"lora": plan(0, steps=50), "lora_attention": plan(4, steps=50)}
    for name, of_run in plans.items():
        runs.join(name, of_run)
    runs.finish()
    for name, of_run in plans.items():
        check_same(runs.rows[name], alone(tiny_model, METHODS[name], of_run))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_diverges_ends_its_own_run_alone(tiny_model: Path, precision: Precision) -> None:
    runs = Runs(tiny_model, precision=precision)
    plans = {name: plan(number, steps=6, precision=precision) for number, name in enumerate(METHODS)}
    for name in ("lora", "adapter", "prefix"):
        runs.join(name, plans[name])
    members = list(runs.members.values())
    runs.pack.begin(members)
    with torch.no_grad():
        for parameter in trained_parameters(runs.members["adapter"].model).values():
            parameter.fill_(float("nan"))
    results = runs.pack.step(members)
    assert isinstance(results["adapter"], FloatingPointError)
    del runs.members["adapter"]
    runs.rows = {name: [results[name]] for name in ("lora", "prefix")}  # type: ignore[list-item]
    runs.finish()
    for name, mine in runs.rows.items():
        expected = alone(tiny_model, METHODS[name], plans[name])[1:]
        check_same(mine, expected, within=1e-4 if precision == "fp32" else 0.05)


def test_the_base_and_other_runs_weights_stay_as_they_are(tiny_model: Path) -> None:
    runs = Runs(tiny_model)
    before = {name: tensor.clone() for name, tensor in runs.pack.base.state_dict().items()}
    for number, name in enumerate(METHODS):
        runs.join(name, plan(number, steps=5))
    waiting = runs.members["dora"].optimizer.weights()
    runs.pack.step([member for name, member in runs.members.items() if name != "dora"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in runs.pack.base.state_dict().items())
    assert all(torch.equal(now, waiting[name]) for name, now in runs.members["dora"].optimizer.weights().items())


def test_rows_are_cut_behind_their_last_label_and_no_label_is_lost() -> None:
    ids = [torch.arange(1, 8).numpy(), torch.arange(11, 15).numpy(), torch.arange(21, 24).numpy()]
    masks = [[0, 0, 1, 1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0]]
    batch = collate(ids, [torch.tensor(mask, dtype=torch.bool).numpy() for mask in masks])
    (whole,) = pieces_of(batch, most_tokens=100)
    assert whole.ids.tolist() == [1, 2, 3, 4, 11, 12, 13, 14] + [0] * 24
    assert whole.lengths == (4, 4, 24), "sizes repeat, and what fills up is a document of its own"
    assert whole.labels.tolist() == [3, 4, 14]
    assert whole.ids[whole.predicting].tolist() == [2, 3, 13]
    split: list[Piece] = pieces_of(batch, most_tokens=4)
    assert [piece.labels.tolist() for piece in split] == [[3, 4], [14]]


def test_what_cannot_share_a_base_is_said_with_its_reason() -> None:
    def why(**settings: object) -> str | None:
        return why_not_packed(
            TrainConfig.model_validate({"data": "d", "output": "o", "workers": {"count": 1}, "samples": 0, **settings})
        )

    assert why() is None
    assert "method.type='full'" in (why(method={"type": "full"}) or "")
    assert "dropout" in (why(method={"type": "lora", "dropout": 0.1}) or "")
    assert "workers.count=2" in (why(workers={"count": 2}) or "")
    assert "fp16" in (why(precision="fp16") or "")
