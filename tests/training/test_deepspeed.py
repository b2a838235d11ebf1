"""The loop over two gloo processes with DeepSpeed, against one plain process. No Ray."""

import json
import os
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
from app.data.batches import Batch, collate, empty_batch
from app.methods import apply_method
from app.methods.delta import load_trained
from app.models.checkpoints import load_decoder
from app.training import deepspeed, loop
from app.training.checkpoint_store import CheckpointStore
from app.training.checkpointing import Checkpoint, read_checkpoint
from app.training.deepspeed import DeepSpeedOptimizer
from app.training.optimizer import PlainOptimizer
from app.training.workers import rank, world_size

OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
METHODS = {
    "lora": LoraConfig(rank=4),
    "full": FullConfig(),
    # What reads weights outside the module that holds them, and what returns its own, which ZeRO-3 has to find whole.
    "mixed": ComposedConfig(parts=(LoraConfig(rank=4, dora=True), AdapterConfig(size=4), PrefixConfig(length=3))),
}
ROWS, STEPS, HALF = 16, 8, 4
STAGES = {0: 1, 1: 2, 2: 8, 3: 4}
"""ZeRO stages, and into how many micro-batches each worker splits its 8 rows there."""


def batch_of(step: int) -> Batch:
    """This process's records of a step: of records of uneven length, every second one where there are two."""
    draw = torch.Generator().manual_seed(step)
    lengths = torch.randint(4, 40, (ROWS,), generator=draw).tolist()
    rows = [torch.randint(0, 400, (length,), generator=draw).numpy() for length in lengths]
    mine = rows[rank() :: world_size()]
    return collate(mine, [(torch.arange(len(row)) >= 2).numpy() for row in mine])


OF_ONE_WORKER = collate([torch.arange(30).numpy()], [torch.ones(30, dtype=torch.bool).numpy()])


def train(model_folder: Path, method: str, output: Path, *, zero_stage: int | None, resume: Path | None = None) -> None:
    """Train to `STEPS`; leaves checkpoints and `metrics.json` in `output`. Without a ZeRO stage, no DeepSpeed."""
    model = load_decoder(model_folder)
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
            STEPS,
            eval_every=STEPS,
            save_every=HALF,
            optimizer=OPTIMIZER,
            precision="fp32",
            seed=7,
            is_packed=False,
            micro_batches=1 if zero_stage is None else STAGES[zero_stage],
        ),
        start_step=start,
        batches=map(batch_of, range(start, STEPS)),
        validation=lambda: [batch_of(100), OF_ONE_WORKER if rank() == 0 else empty_batch()],
        report=seen.append,
        save=save,
    )
    if rank() == 0:
        (output / "metrics.json").write_text(json.dumps(seen))


def two_workers(worker: int, model_folder: Path, folder: Path) -> None:
    """What each of the two processes runs: every method and stage, whole, and resumed from the plain run's half."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(worker)}
    torch.set_num_threads(1)
    deepspeed.WHOLE_BELOW = 0  # else ZeRO-3 would partition no weight of so small a model
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=worker, world_size=2)
    for method in METHODS:
        half = folder / method / "plain" / f"step-{HALF:08d}"
        for stage in STAGES:
            train(model_folder, method, folder / method / f"zero-{stage}", zero_stage=stage)
            train(model_folder, method, folder / method / f"resumed-{stage}", zero_stage=stage, resume=half)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    for method in METHODS:
        train(tiny_model, method, folder / method / "plain", zero_stage=None)
    multiprocessing.spawn(two_workers, args=(tiny_model, folder), nprocs=2)
    return folder


def metrics(run: Path) -> dict[int, loop.Metrics]:
    return {row["step"]: row for row in json.loads((run / "metrics.json").read_text())}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["zero", "resumed"])
def test_two_workers_compute_what_one_plain_process_does(runs: Path, method: str, stage: int, kind: str) -> None:
    plain, ours = metrics(runs / method / "plain"), metrics(runs / method / f"{kind}-{stage}")
    assert list(ours) == (list(range(HALF + 1, STEPS + 1)) if kind == "resumed" else list(range(STEPS + 1)))
    for step, row in ours.items():
        compared = [name for name in ("loss", "gradient_norm", "eval_loss") if name in plain[step]]
        assert [row[name] for name in compared] == pytest.approx([plain[step][name] for name in compared], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_two_workers_is_the_plain_ones(runs: Path, method: str, stage: int) -> None:
    for step in (HALF, STEPS):
        name = f"step-{step:08d}"
        plain, ours = (read_checkpoint(runs / method / run / name) for run in ("plain", f"zero-{stage}"))
        assert ours.weights.keys() == plain.weights.keys() and ours.moments.keys() == plain.moments.keys()
        for theirs, mine in ((plain.weights, ours.weights), (plain.moments, ours.moments)):
            for key, tensor in theirs.items():
                torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_process_goes_on_from_two_workers_checkpoint(
    runs: Path, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    train(tiny_model, method, tmp_path, zero_stage=None, resume=runs / method / "zero-1" / f"step-{HALF:08d}")
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
