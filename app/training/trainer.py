"""The loop on a Ray Train worker group, with its metrics streamed back to the driver.

Used by fine-tuning and by pretraining: `run_on_workers` in the driver, `train_on_worker` in each worker. Failure
handling is Ray's: lost workers are replaced and the function starts again from its newest checkpoint. What no new
attempt would mend ends the run: a mistake of the user's, a loss that diverges, Ctrl-C.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from app import console
from app.config.base import Precision
from app.config.schema import AnyWorkersConfig, WorkerResources
from app.data.batches import Batch
from app.errors import Diverged, Interrupted, UserError
from app.methods.delta import load_trained
from app.models.decoder import Decoder
from app.models.precision import resolve_precision
from app.ray_cluster import thread_environment, trainers_know_their_cluster
from app.run_lock import lock_text
from app.training import allocator, loop
from app.training.checkpoint_store import UNWRITTEN, CheckpointStore
from app.training.checkpointing import Checkpoint
from app.training.interruption import Stopped, interruptible
from app.training.loop import Metrics
from app.training.optimizer import Optimizer
from app.training.precision import LossScale, store_frozen
from app.training.workers import collective_device, rank, sum_over_workers, world_size

WorkerFunction = Callable[[dict[str, Any]], None]
SEEN_WITHIN_S = 5.0
"""A shared file system may show a new file to other nodes a little later."""


def check_attention(model: Decoder, *, workers: AnyWorkersConfig, precision: Precision, is_packed: bool) -> None:
    """Try the attention kernel before any worker starts; on GPUs only a worker can tell.

    Raises:
        UserError: `model.attention` cannot train on a CPU.
    """
    if not workers.gpus:
        cpu = torch.device("cpu")
        resolved = resolve_precision(precision, cpu)
        loop.training_attention(model, device=cpu, precision=resolved, is_packed=is_packed)


def run_on_workers(
    function: WorkerFunction,
    payload: dict[str, Any],
    *,
    workers: AnyWorkersConfig,
    output: Path,
    max_failures: int,
    on_metrics: Callable[[Metrics], None],
    feeding: Any = None,
) -> None:
    """Run `function({**payload, "channel": …})` on every worker until all return.

    The function sends metrics through the channel; `on_metrics` gets them here, in order. `feeding` is a `FeedConfig`,
    for workers that read `worker_batches`. `output`'s lock is held.

    Raises:
        UserError: a worker failed for a reason that the user can mend; Diverged, where the loss is no number.
        Interrupted: a signal came, and the workers have saved.
        KeyboardInterrupt: a second one came.
        TrainingFailedError: workers failed for another reason, more than `max_failures` times.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from app.training.channel import Channel
    from app.training.ending import EndRun
    from app.training.regrouping import CountAgain, release_room_of_dead_runs

    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # else the dashboard's Train tab stays empty
    channel = Channel()
    callbacks: list[Any] = [EndRun(channel)]
    if workers.least < workers.most:
        # When a node is lost Ray Train may count on its room once more, and waits for it, by default for a minute. Room
        # that is there is had within moments.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
        callbacks.append(CountAgain())
    trainer = TorchTrainer(
        _on_shared_storage(function),
        train_loop_config={**payload, "channel": channel, "output": output, "lock": lock_text(output)},
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})},
        ),
        run_config=RunConfig(
            # A name of its own each time: our checkpoints, not Ray's snapshot of an earlier run, say where to go on.
            name=f"{output.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(output / "ray"),
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": worker_environment(workers)},
            callbacks=callbacks,
        ),
        datasets={feeding.name: feeding.feed} if feeding else None,
        dataset_config=feeding,
    )
    try:
        release_room_of_dead_runs()
        with trainers_know_their_cluster():
            _fit(trainer, channel, on_metrics)
    except Exception as error:
        ending = _ending(error, output)
        if ending is None:
            raise
        raise ending from None
    finally:
        channel.close()


def _fit(trainer: Any, channel: Any, on_metrics: Callable[[Metrics], None]) -> None:
    """`trainer.fit()`, metrics handed on meanwhile.

    In a thread of its own, where Ray Train leaves signals alone: it would end the run without a checkpoint. Where
    `on_metrics` fails, as it does on a full disk, the run is stopped, and the failure raised.
    """
    fit_errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            fit_errors.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    failure: Exception | None = None
    is_running, has_asked = True, False
    with interruptible(lambda: console.say("stopping after this step; Ctrl-C again ends at once")) as is_interrupted:
        thread.start()
        while is_running:
            thread.join(0.2)
            is_running = thread.is_alive()
            failure = failure or _hand_on(channel, on_metrics)
            if not has_asked and (failure or is_interrupted()):
                channel.ask_to_stop()
                has_asked = True
    for error in filter(None, (failure, *fit_errors)):
        raise error


def _ending(error: Exception, output: Path) -> BaseException | None:
    """What Ray Train's `error` means to the user, where it is no fault of ours."""
    cause = getattr(error, "controller_failure", None)
    if isinstance(cause, Stopped):
        return Interrupted(
            f"stopped after step {cause.step} of {cause.total_steps}, which is saved; --resume goes on from there"
        )
    if isinstance(cause, FloatingPointError):
        return Diverged(str(cause))
    if isinstance(cause, UserError):
        return UserError(str(cause))
    if isinstance(cause, OSError):
        return UserError(f"{str(output / 'ray')!r}: Ray Train's own records cannot be written: {cause}")
    return None


def _hand_on(channel: Any, on_metrics: Callable[[Metrics], None]) -> Exception | None:
    """Give what was sent to `on_metrics`; returns what it raised."""
    try:
        for metrics in channel.take():
            on_metrics(metrics)
    except Exception as error:
        return error
    return None


def _on_shared_storage(function: WorkerFunction) -> WorkerFunction:
    """`function`, on workers that see the folder whose lock the driver holds."""

    def run(payload: dict[str, Any]) -> None:
        deadline = time.monotonic() + SEEN_WITHIN_S
        while lock_text(payload["output"]) != payload["lock"]:
            if time.monotonic() > deadline:
                raise UserError(
                    f"a worker on {socket.gethostname()} does not see the run in output={str(payload['output'])!r}; "
                    "output must lie on storage that all nodes share"
                )
            time.sleep(0.5)
        function(payload)

    return run


def train_on_worker(
    model: Decoder,
    *,
    plan: loop.Plan,
    make_optimizer: Callable[[Decoder, Checkpoint | None], Optimizer],
    checkpoints: CheckpointStore,
    keep_last: int,
    keep_best: int = 0,
    about: Callable[[int], Mapping[str, Any]],
    batches: Callable[[int], Iterator[Batch]],
    validation: Callable[[], Iterable[Batch]],
    channel: Any,
    until: int | None = None,
    on_save: Callable[[Metrics], None] = lambda metrics: None,
) -> Metrics:
    """Train `model`'s trainable weights from the newest checkpoint, if any, to the plan's end, or to the step `until`;
    ends on the device.

    Returns the metrics of the last step.

    `make_optimizer(model, checkpoint)` is called with the model on its device;
    `batches(start_step)` yields this worker's batches. `about(step)` is what identifies the run and its place in the
    data after that step: it is written into the checkpoint, and one that says something else is refused. Only rank 0
    sends metrics through `channel`, calls `on_save`, and then writes the checkpoint. This has what the driver may not
    have written down yet, which would else be lost with it.

    Raises:
        Stopped: the driver asked to stop; the last step is saved.
        UserError: a checkpoint cannot be read or written, or is of another run.
    """
    import ray.train.torch

    should_stop = channel.watch()
    checkpoint = checkpoints.latest()
    if checkpoint is not None:
        check_continues(checkpoint, about(checkpoint.step), place=checkpoints.place)
        load_trained(model, checkpoint.weights)
    device = ray.train.torch.get_device()
    model.to(device)
    store_frozen(model, plan.precision, device)
    optimizer = make_optimizer(model, checkpoint)
    start_step = checkpoint.step if checkpoint else 0
    _check_agreed(start_step, checkpoints.place)
    saved: Metrics = dict(checkpoint.state["metrics"]) if checkpoint else {}
    unwritten: list[Metrics] = []

    def report(metrics: Metrics) -> None:
        of_all = worker_memory() if "eval_loss" in metrics else {}  # collective, and evaluations are on all workers
        if rank() == 0:
            row = {**metrics, **of_all, "workers": world_size(), "peak_worker_bytes": peak_memory_bytes()}
            unwritten.append(row)
            del unwritten[: -channel.send(row)]

    def save(step: int, metrics: Metrics) -> None:
        made = checkpoint_of(optimizer, metrics, about={**about(step), UNWRITTEN: list(unwritten)})  # collective
        saved.update(metrics)
        if rank() == 0:
            on_save(metrics)  # before: a step of which there is a checkpoint does not come again
            checkpoints.save(made, keep_last=keep_last, keep_best=keep_best)
        ray.train.report(made.state["metrics"])

    last_step = loop.run(
        model,
        optimizer,
        plan=plan,
        start_step=start_step,
        batches=batches(start_step),
        validation=validation,
        report=report,
        save=save,
        should_stop=should_stop,
        until=until,
        loss_scale=LossScale.after(checkpoint.state["metrics"] if checkpoint else {}),
    )
    if last_step < (plan.total_steps if until is None else until):
        raise Stopped(last_step, plan.total_steps)
    return saved


def checkpoint_of(optimizer: Optimizer, metrics: Metrics, *, about: Mapping[str, Any]) -> Checkpoint:
    """After the step of `metrics`; a collective call."""
    figures = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    state = {**about, "workers": world_size(), "metrics": figures}
    return Checkpoint(metrics["step"], optimizer.weights(), optimizer.moments(), state)


def check_continues(checkpoint: Checkpoint, expected: Mapping[str, Any], *, place: str) -> None:
    """Refuse a checkpoint that is not of this run, or stands elsewhere in its data."""
    for name, value in expected.items():
        if checkpoint.state.get(name) != value:
            raise UserError(
                f"the checkpoint of step {checkpoint.step} in {place!r} is of another run: its {name} is "
                f"{checkpoint.state.get(name)!r}, here {value!r}"
            )


def _check_agreed(start_step: int, place: str) -> None:
    """Refuse to start where workers found different checkpoints, as they do without shared storage."""
    (total,) = sum_over_workers(start_step, device=collective_device())
    if total != start_step * world_size():
        raise UserError(
            f"the workers do not see the same checkpoints in {place!r}; it must lie on storage that all nodes share"
        )


def peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def worker_memory() -> dict[str, list[float]]:
    """Peak bytes of each worker, by rank: of its process, and on a GPU there; every worker must call this."""
    device = collective_device()

    def of_all(mine: int) -> list[float]:
        return sum_over_workers(*(mine if other == rank() else 0 for other in range(world_size())), device=device)

    memory = {"worker_bytes": of_all(peak_memory_bytes())}
    if device.type == "cuda":
        memory["worker_gpu_bytes"] = of_all(torch.cuda.max_memory_allocated())
    return memory


def worker_environment(workers: WorkerResources) -> dict[str, str]:
    """Environment variables of a process that trains."""
    environment = thread_environment(workers)
    if not workers.gpus:
        environment |= allocator.ENVIRONMENT
        environment["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed guesses from what is installed
    return environment
