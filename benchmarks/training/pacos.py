"""Pacos as a contender: the loop in one plain process, and the whole of `pacos train` through Ray Train."""

import time
from collections.abc import Iterator
from typing import Any

from benchmarks.training.task import ALPHA, LEARNING_RATE, RANK, SEED, Task, feed_of, rows_per_step


def in_process(task: Task, layout: str) -> dict[str, Any]:
    """`app/training/loop.py` alone, on `padded` or `packed` rows."""
    import torch

    from app.data.batches import Batch, batches_by_length
    from app.data.shards import COLUMNS, read_manifest
    from app.methods import apply_method
    from app.models.checkpoints import load_decoder
    from app.training import loop
    from app.training.optimizer import PlainOptimizer, trained_parameters
    from app.training.precision import store_frozen
    from app.training.trainer import peak_memory_bytes

    torch.set_num_threads(task.threads)
    model = load_decoder(task.path("model"))
    torch.manual_seed(SEED)
    apply_method(model, _method())
    store_frozen(model, "auto", torch.device("cpu"))
    total_steps = task.total_steps(is_fast=True)
    feed = feed_of(task, layout, total_steps=total_steps)
    table = read_manifest(str(task.path(layout))).read("validation")
    rows = list(zip(*(table[name].to_numpy() for name in COLUMNS), strict=True))
    held_out = list(batches_by_length(rows, size=feed.batch_size))

    def batches() -> Iterator[Batch]:
        for window in feed.windows():
            for packet in feed.packets(window, workers=1):
                yield from feed.batches(packet, workers=1)

    log = Log()
    loop.run(
        model,
        PlainOptimizer(model, _optimizer()),
        plan=loop.Plan(
            total_steps=total_steps,
            eval_every=_eval_every(task, layout),
            save_every=total_steps,
            optimizer=_optimizer(),
            precision="auto",
            seed=SEED,
            is_packed=layout == "packed",
        ),
        start_step=0,
        batches=batches(),
        validation=lambda: held_out,
        report=log.add,
        save=lambda step, metrics: None,
    )
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    return {**log.figures(), "trained": trained, "peak_bytes": peak_memory_bytes()}


def through_ray(task: Task) -> dict[str, Any]:
    """`pacos train` on packed rows: Ray Train, DeepSpeed and Ray Data, one worker with all cores."""
    from app.config import TrackingConfig, TrainConfig
    from app.config.schema import ElasticWorkersConfig
    from app.ray_cluster import connected
    from app.training.fine_tuning import fine_tune, plan_job

    total_steps = task.total_steps(is_fast=True)
    config = TrainConfig(
        data=str(task.path("packed")),
        output=str(task.path(f"run-{time.time_ns()}")),
        model=str(task.path("model")),
        method=_method(),
        batch_size=rows_per_step(task, "packed"),
        epochs=total_steps,  # an epoch has a step or more; max_steps ends the run
        max_steps=total_steps,
        optimizer=_optimizer(),
        eval_every=_eval_every(task, "packed"),
        save_every=total_steps,
        workers=ElasticWorkersConfig(count=1, cpus=task.threads, threads=task.threads),
        tracking=TrackingConfig(uri="none"),
        samples=0,
        seed=SEED,
    )
    log = Log()
    job = plan_job(config)
    with connected(None, min_cpus=task.threads + 1):
        summary = fine_tune(job, on_metrics=log.add)
    peak = summary["peak_worker_bytes"]
    return {**log.figures(), "trained": summary["trained_parameters"], "peak_bytes": peak}


class Log:
    """The loop's metrics, and when each came."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.times: list[float] = []

    def add(self, metrics: dict[str, Any]) -> None:
        self.rows.append(dict(metrics))
        self.times.append(time.perf_counter())

    def figures(self) -> dict[str, Any]:
        """The loop's own seconds, which waiting for data is part of; and, from one report to the next, all of them.

        The last step is left out of the latter, because an evaluation comes before its report.
        """
        first, *steps = self.rows
        between = [row["tokens"] for row in steps[1:-1]]
        return {
            "steps": [{"seconds": row["step_s"], "tokens": row["tokens"], "loss": row["loss"]} for row in steps],
            "held_out_loss": {str(row["step"]): row["eval_loss"] for row in self.rows if "eval_loss" in row},
            "wall_tokens_per_s": sum(between) / (self.times[-2] - self.times[1]),
            "computed_in": first["precision"],
            "kernels": first["kernels"],
        }


def _method() -> Any:
    from app.config import LoraConfig

    return LoraConfig(rank=RANK, alpha=ALPHA)


def _optimizer() -> Any:
    from app.config import OptimizerConfig

    return OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", warmup_fraction=0.0)


def _eval_every(task: Task, layout: str) -> int:
    """Padded, after each pass, as the peers; packed, at the end alone, so that reports come at even intervals."""
    return 1 + task.steps if layout == "padded" else task.total_steps(is_fast=True)
