"""The loop on a Ray Train worker group, with its metrics streamed back to the driver.

Used by fine-tuning and by pretraining: `run_on_workers` in the driver, `train_on_worker` in each worker. Failure
handling is Ray's: lost workers are replaced and the function starts again from its newest checkpoint.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from app.config.base import Precision
from app.config.schema import WorkersConfig
from app.data.batches import Batch
from app.errors import UserError
from app.methods.delta import load_trained
from app.models.decoder import Decoder
from app.ray_cluster import thread_environment
from app.training import loop
from app.training.checkpointing import Checkpoint, latest_step, save_step
from app.training.loop import Metrics
from app.training.optimizer import Optimizer
from app.training.precision import resolve_precision
from app.training.workers import rank, sum_over_workers, world_size

WorkerFunction = Callable[[dict[str, Any]], None]


def check_attention(model: Decoder, *, workers: WorkersConfig, precision: Precision, is_packed: bool) -> None:
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
    workers: WorkersConfig,
    output: Path,
    max_failures: int,
    on_metrics: Callable[[Metrics], None],
    feeding: Any = None,
) -> None:
    """Run `function({**payload, "send": …})` on every worker until all return.

    The function sends metrics with `payload["send"](metrics)`; `on_metrics` gets them here, in order. `feeding` is a
    `FeedConfig`, for workers that read `worker_batches`.

    Raises:
        UserError: a worker failed for a reason that the user can mend.
        TrainingFailedError: workers failed for another reason, more than `max_failures` times.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # else the dashboard's Train tab stays empty
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _without_retrying_divergence(function),
        train_loop_config={**payload, "send": queue.put},
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})},
        ),
        run_config=RunConfig(
            # A name of its own each time: our checkpoints, not Ray's snapshot of an earlier run, say where to go on.
            name=time.strftime("run-%Y%m%d-%H%M%S"),
            storage_path=str(output / "ray"),
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": _worker_environment(workers)},
        ),
        datasets={feeding.name: feeding.feed} if feeding else None,
        dataset_config=feeding,
    )
    try:
        with _draining(queue, on_metrics), _interrupt_handler_kept():
            trainer.fit()
    except SystemExit:  # how Ray Train ends a run after Ctrl-C
        raise KeyboardInterrupt from None
    except Exception as error:
        mistake = _user_mistake(error)
        if mistake is None:
            raise
        raise mistake from None
    finally:
        queue.shutdown()


@contextmanager
def _interrupt_handler_kept() -> Iterator[None]:
    """Ray Train takes Ctrl-C over, to abort the run, and never gives it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _without_retrying_divergence(function: WorkerFunction) -> WorkerFunction:
    """`function`, ending quietly where the loss diverges, which it does on every worker: Ray would retry an error."""

    def run(payload: dict[str, Any]) -> None:
        try:
            function(payload)
        except FloatingPointError as error:
            if rank() == 0:
                payload["send"](error)

    return run


def train_on_worker(
    model: Decoder,
    *,
    plan: loop.Plan,
    make_optimizer: Callable[[Decoder, Checkpoint | None], Optimizer],
    checkpoints: Path,
    keep_checkpoints: int,
    batches: Callable[[int], Iterator[Batch]],
    validation: Callable[[], Iterable[Batch]],
    send: Callable[[Metrics], None],
    on_save: Callable[[Metrics], None] = lambda metrics: None,
) -> Metrics:
    """Train `model`'s trainable weights from the newest checkpoint, if any, to the plan's end; ends on the device.

    Returns the metrics of the last step, none where the checkpoint was of the last step already.

    `make_optimizer(model, checkpoint)` is called with the model on its device;
    `batches(start_step)` yields this worker's batches. Only rank 0 sends metrics, writes checkpoints, and then calls
    `on_save`.
    """
    import ray.train.torch

    checkpoint = latest_step(checkpoints)
    if checkpoint is not None:
        load_trained(model, checkpoint.weights)
    model.to(ray.train.torch.get_device())
    optimizer = make_optimizer(model, checkpoint)
    start_step = checkpoint.step if checkpoint else 0
    _check_agreed(start_step, checkpoints)
    saved: Metrics = {}

    def report(metrics: Metrics) -> None:
        of_all = worker_memory() if "eval_loss" in metrics else {}  # collective, and evaluations are on all workers
        if rank() == 0:
            send({**metrics, **of_all, "workers": world_size(), "peak_worker_bytes": peak_memory_bytes()})

    def save(step: int, metrics: Metrics) -> None:
        state = Checkpoint(step, optimizer.weights(), optimizer.moments())  # collective
        saved.update(metrics)
        if rank() == 0:
            save_step(checkpoints, state, keep=keep_checkpoints)
            on_save(metrics)
        ray.train.report({key: value for key, value in metrics.items() if isinstance(value, (int, float))})

    loop.run(
        model,
        optimizer,
        plan=plan,
        start_step=start_step,
        batches=batches(start_step),
        validation=validation,
        report=report,
        save=save,
    )
    return saved


def _check_agreed(start_step: int, checkpoints: Path) -> None:
    """Refuse to start where workers found different checkpoints, as they do without shared storage."""
    device = torch.device("cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu")
    (total,) = sum_over_workers(start_step, device=device)
    if total != start_step * world_size():
        raise UserError(
            f"the workers do not see the same checkpoints in {str(checkpoints)!r}; output must lie on storage that all "
            "nodes share"
        )


def peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def worker_memory() -> dict[str, list[float]]:
    """Peak bytes of each worker, by rank: of its process, and on a GPU there; every worker must call this."""
    on_gpu = torch.cuda.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"
    device = torch.device("cuda" if on_gpu else "cpu")

    def of_all(mine: int) -> list[float]:
        return sum_over_workers(*(mine if other == rank() else 0 for other in range(world_size())), device=device)

    memory = {"worker_bytes": of_all(peak_memory_bytes())}
    if on_gpu:
        memory["worker_gpu_bytes"] = of_all(torch.cuda.max_memory_allocated())
    return memory


def _worker_environment(workers: WorkersConfig) -> dict[str, str]:
    environment = {
        **thread_environment(workers),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin take the cores that other workers need
    }
    if not workers.gpus:
        environment["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed guesses from what is installed
    return environment


@contextmanager
def _draining(queue: Any, on_metrics: Callable[[Metrics], None]) -> Iterator[None]:
    """Hand the queue's items to `on_metrics` from a thread of its own; on leaving, what is still in it.

    Raises on leaving what a worker sent as an exception, or what `on_metrics` raised.
    """
    finished = threading.Event()
    failures: list[Exception] = []

    def drain() -> None:
        while not failures:
            was_finished = finished.is_set()
            try:
                for item in queue.get_nowait_batch(queue.size()):
                    if isinstance(item, Exception):
                        raise item
                    on_metrics(item)
            except Exception as error:
                failures.append(error)
            if was_finished:
                return
            time.sleep(0.2)

    thread = threading.Thread(target=drain, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
    if failures:
        raise failures[0]


def _user_mistake(error: Exception) -> UserError | None:
    """A worker's own error where it is one that the user can mend."""
    for failure in getattr(error, "worker_failures", {0: error}).values():
        cause = getattr(failure, "_base_exc", failure)  # Ray Train's wrapper keeps the worker's exception there
        if isinstance(cause, UserError | FloatingPointError):
            return UserError(str(cause))
    return None
