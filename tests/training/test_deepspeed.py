"""The loop over two gloo processes with DeepSpeed, against one plain process. No Ray."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from app.config import (
    AdapterConfig,
    ComposedConfig,
    DeepSpeedConfig,
    FullConfig,
    LoraConfig,
    OptimizerConfig,
    PrefixConfig,
)
from app.config.base import Precision
from app.data.batches import Batch, collate, empty_batch
from app.methods import apply_method
from app.methods.delta import load_trained
from app.models.checkpoints import load_decoder
from app.training import deepspeed, loop
from app.training.checkpoint_store import CheckpointStore
from app.training.checkpointing import Checkpoint, read_checkpoint
from app.training.deepspeed import DeepSpeedOptimizer
from app.training.optimizer import PlainOptimizer
from app.training.precision import LEFT_OUT, LossScale
from app.training.workers import rank, world_size

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, clip_norm=0.01)
METHODS = {
    "lora": LoraConfig(rank=4),
    "full": FullConfig(),
    # What reads weights outside the module that holds them, and what returns its own, which ZeRO-3 has to find whole.
    "mixed": ComposedConfig(parts=(LoraConfig(rank=4, dora=True), AdapterConfig(size=4), PrefixConfig(length=3))),
}


@dataclass(frozen=True)
class Size:
    rows: int
    """Of each step, over all workers."""
    steps: int
    half: int
    """The step that resumed runs go on from."""

    def checkpoint(self, step: int | None = None) -> str:
        return f"step-{step or self.steps:08d}"


SIZES = {"lora": Size(32, 20, 16), "full": Size(16, 4, 2), "mixed": Size(16, 4, 2)}
STAGES = {0: 1, 1: 2, 2: 16, 3: 4}
"""ZeRO stages, and into how many micro-batches each worker splits its rows there. With LoRA it has 16 of them, else 8:
every second micro-batch is empty then under ZeRO-2."""

IN_HALF: dict[Precision, str] = {"bf16": "bf16", "fp16": "overflow"}
"""Runs that are computed in half the bits, and the names of their folders: in fp16 the first two steps overflow."""


def batch_of(step: int, size: Size) -> Batch:
    """This process's records of a step: of records of uneven length, every second one where there are two."""
    draw = torch.Generator().manual_seed(step)
    lengths = torch.randint(4, 40, (size.rows,), generator=draw).tolist()
    rows = [torch.randint(0, 400, (length,), generator=draw).numpy() for length in lengths]
    mine = rows[rank() :: world_size()]
    return collate(mine, [(torch.arange(len(row)) >= 2).numpy() for row in mine])


OF_ONE_WORKER = collate([torch.arange(30).numpy()], [torch.ones(30, dtype=torch.bool).numpy()])


class SteepScale(LossScale):
    """fp16's factor, which falls by 2^12 at an overflow instead of 2: from 2^40 on two steps overflow and are left out,
    and the two after them are not."""

    START = 2.0**40

    def update(self, *, is_finite: bool) -> None:
        super().update(is_finite=is_finite)
        if not is_finite:
            self.value /= 2**11


def train(
    model_folder: Path,
    method: str,
    output: Path,
    *,
    zero_stage: int | None,
    resume: Path | None = None,
    precision: Precision = "fp32",
) -> None:
    """Train to the end; leaves checkpoints and `metrics.json` in `output`. Without a ZeRO stage, no DeepSpeed."""
    model, size = load_decoder(model_folder), SIZES[method]
    torch.manual_seed(0)
    apply_method(model, METHODS[method])
    checkpoint = read_checkpoint(resume) if resume else None
    if checkpoint:
        load_trained(model, checkpoint.weights)
    optimizer: Any
    if zero_stage is None:
        optimizer = PlainOptimizer(model, OPTIMIZER, resume=checkpoint)
    else:
        stage = DeepSpeedConfig(zero_stage=zero_stage)
        optimizer = DeepSpeedOptimizer(model, OPTIMIZER, deepspeed=stage, resume=checkpoint)
    start = checkpoint.step if checkpoint else 0
    seen: list[loop.Metrics] = []

    def save(step: int, metrics: loop.Metrics) -> None:
        state = Checkpoint(step, optimizer.weights(), optimizer.moments())
        if rank() == 0:
            CheckpointStore(output).save(state, keep_last=2)

    loop.run(
        model,
        optimizer,
        plan=loop.Plan(
            size.steps,
            eval_every=size.steps,
            save_every=size.half,
            optimizer=OPTIMIZER,
            precision=precision,
            seed=7,
            is_packed=False,
            micro_batches=1 if zero_stage is None else STAGES[zero_stage],
        ),
        start_step=start,
        batches=(batch_of(step, size) for step in range(start, size.steps)),
        validation=lambda: [batch_of(100, size), OF_ONE_WORKER if rank() == 0 else empty_batch()],
        report=seen.append,
        save=save,
        loss_scale=SteepScale(SteepScale.START),
    )
    if rank() == 0:
        (output / "metrics.json").write_text(json.dumps(seen))


def of_fp16(folder: Path) -> Path:
    """The checkpoint that resumed runs of `full` go on from, as one whose first step an overflow in fp16 left out."""
    name = SIZES["full"].checkpoint(SIZES["full"].half)
    left_out = folder / "full" / "fp16" / name
    if not left_out.exists():
        whole = read_checkpoint(folder / "full" / "plain" / name)
        CheckpointStore(left_out.parent).save(replace(whole, state={"metrics": {LEFT_OUT: 1}}), keep_last=1)
    return left_out


def two_workers(worker: int, model_folder: Path, folder: Path) -> None:
    """What each of the two processes runs: every method and stage, whole, and resumed from the plain run's half."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(worker)}
    torch.set_num_threads(1)
    deepspeed.WHOLE_BELOW = 0  # else ZeRO-3 would partition no weight of so small a model
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=worker, world_size=2)
    for method, size in SIZES.items():
        half = folder / method / "plain" / size.checkpoint(size.half)
        for stage in STAGES:
            train(model_folder, method, folder / method / f"zero-{stage}", zero_stage=stage)
            train(model_folder, method, folder / method / f"resumed-{stage}", zero_stage=stage, resume=half)
    for stage in STAGES:
        train(model_folder, "full", folder / "full" / f"fp16-{stage}", zero_stage=stage, resume=of_fp16(folder))
        for precision, name in IN_HALF.items():
            train(model_folder, "full", folder / "full" / f"{name}-{stage}", zero_stage=stage, precision=precision)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    for method in METHODS:
        train(tiny_model, method, folder / method / "plain", zero_stage=None)
    train(tiny_model, "full", folder / "full" / "fp16-plain", zero_stage=None, resume=of_fp16(folder))
    for precision, name in IN_HALF.items():
        train(tiny_model, "full", folder / "full" / f"{name}-plain", zero_stage=None, precision=precision)
    multiprocessing.spawn(two_workers, args=(tiny_model, folder), nprocs=2)
    return folder


def metrics(run: Path) -> dict[int, loop.Metrics]:
    return {row["step"]: row for row in json.loads((run / "metrics.json").read_text())}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["zero", "resumed"])
def test_two_workers_compute_what_one_plain_process_does(runs: Path, method: str, stage: int, kind: str) -> None:
    plain, ours = metrics(runs / method / "plain"), metrics(runs / method / f"{kind}-{stage}")
    size = SIZES[method]
    assert list(ours) == list(range(size.half + 1 if kind == "resumed" else 0, size.steps + 1))
    for step, row in ours.items():
        compared = [name for name in ("loss", "gradient_norm", "eval_loss") if name in plain[step]]
        assert [row[name] for name in compared] == pytest.approx([plain[step][name] for name in compared], rel=1e-5)
        assert step == 0 or row["gradient_norm"] > OPTIMIZER.clip_norm, "so that all of them have to cut it"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_two_workers_is_the_plain_ones(runs: Path, method: str, stage: int) -> None:
    for name in (SIZES[method].checkpoint(SIZES[method].half), SIZES[method].checkpoint()):
        plain, ours = (read_checkpoint(runs / method / run / name) for run in ("plain", f"zero-{stage}"))
        assert ours.weights.keys() == plain.weights.keys() and ours.moments.keys() == plain.moments.keys()
        for key, tensor in plain.weights.items():
            torch.testing.assert_close(ours.weights[key], tensor, rtol=1e-3, atol=1e-5)
        for key, tensor in plain.moments.items():  # the second are squares, of which 1e-5 would be most
            largest = float(tensor.abs().max())
            torch.testing.assert_close(ours.moments[key], tensor, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("stage", STAGES)
def test_steps_that_an_overflow_left_out_do_not_count_for_adam_on_two_workers_either(runs: Path, stage: int) -> None:
    name = SIZES["full"].checkpoint()
    plain, ours, other = (
        read_checkpoint(runs / "full" / run / name).weights for run in ("fp16-plain", f"fp16-{stage}", "plain")
    )
    close = {"rtol": 1e-3, "atol": 1e-5}
    for key, tensor in plain.items():
        torch.testing.assert_close(ours[key], tensor, **close)
    assert not all(torch.allclose(other[key], tensor, **close) for key, tensor in plain.items()), "it can be seen"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", IN_HALF.values())
def test_two_workers_in_half_precision_train_as_one_plain_process_does(runs: Path, stage: int, name: str) -> None:
    exact, plain, ours = (metrics(runs / "full" / run) for run in ("plain", f"{name}-plain", f"{name}-{stage}"))
    assert list(ours) == list(plain) == list(exact)
    for step, row in ours.items():
        assert row.keys() == plain[step].keys()
        # Rounding comes in another order where a step is cut into other parts.
        compared = [key for key in ("loss", "gradient_norm", "eval_loss") if key in row]
        assert [row[key] for key in compared] == pytest.approx([plain[step][key] for key in compared], rel=0.01)
    weights = read_checkpoint(runs / "full" / f"{name}-{stage}" / SIZES["full"].checkpoint()).weights
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert ours[1]["loss"] != exact[1]["loss"], "it is another precision"
    assert ours[1]["loss"] == pytest.approx(exact[1]["loss"], rel=0.01)


@pytest.mark.parametrize("stage", ["plain", *STAGES])
def test_steps_that_overflow_in_fp16_change_no_weight_and_the_schedule_goes_on(
    runs: Path, tiny_model: Path, stage: int | str
) -> None:
    run, size, exact = runs / "full" / f"overflow-{stage}", SIZES["full"], metrics(runs / "full" / "plain")
    seen = metrics(run)
    assert [seen[step]["loss_scale"] for step in range(1, 5)] == [2.0**40, 2.0**28, 2.0**16, 2.0**16]
    assert [step for step, row in seen.items() if "gradient_norm" in row] == [3, 4]
    assert seen[4][LEFT_OUT] == 2
    before = load_decoder(tiny_model).state_dict()
    left_out, trained = (read_checkpoint(run / size.checkpoint(step)).weights for step in (2, 4))
    assert all(torch.equal(weight, before[name]) for name, weight in left_out.items())
    assert all(not torch.equal(weight, before[name]) for name, weight in trained.items())
    assert all(weight.isfinite().all() for weight in trained.values())
    for step in range(1, 5):  # its rate follows from the number of the step, made or left out
        assert seen[step]["learning_rate"] == exact[step]["learning_rate"]


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_process_goes_on_from_two_workers_checkpoint(
    runs: Path, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    half = SIZES[method].checkpoint(SIZES[method].half)
    train(tiny_model, method, tmp_path, zero_stage=None, resume=runs / method / "zero-1" / half)
    for step, row in metrics(tmp_path).items():
        assert row["loss"] == pytest.approx(metrics(runs / method / "plain")[step]["loss"], rel=1e-5)


@pytest.mark.parametrize(("rows", "workers", "size"), [(17, 2, 8), (5, 2, 1), (2, 3, 4), (16, 2, 8)])
def test_workers_evaluate_as_many_batches_each(rows: int, workers: int, size: int, monkeypatch) -> None:
    """Under ZeRO-3 a worker that had one less would leave the others waiting."""
    from app.training import fine_tuning  # not what the other tests' processes need

    ids = [list(range(3 + number)) for number in range(rows)]
    table = pa.table({"input_ids": ids, "loss_mask": [[True] * len(row) for row in ids],
                      "lengths": [[len(row)] for row in ids]})  # fmt: skip
    job = SimpleNamespace(
        manifest=SimpleNamespace(read=lambda split: table),
        config=SimpleNamespace(micro_batch_size=size, batch_size=None),
    )
    monkeypatch.setattr(fine_tuning, "world_size", lambda: workers)
    shares = []
    for worker in range(workers):
        monkeypatch.setattr(fine_tuning, "rank", lambda worker=worker: worker)
        shares.append(fine_tuning.validation_batches(job))
    assert len({len(share) for share in shares}) == 1
    assert sum(batch.loss_tokens for share in shares for batch in share) == sum(len(row) - 1 for row in ids)
