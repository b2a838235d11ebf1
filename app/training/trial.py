"""Three steps of a run, in one plain process of their own: what they take in seconds and in memory.

The loop is the run's own, with one worker's rows. Ray and DeepSpeed are imported, because a worker has them too, and
not used.
"""

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from app.assets import model_folder
from app.config.schema import TrainConfig
from app.data.batches import Batch
from app.errors import UserError
from app.models.checkpoints import empty_decoder, load_decoder
from app.training import loop
from app.training.deepspeed import import_deepspeed
from app.training.fine_tuning import set_up
from app.training.loop import Metrics
from app.training.optimizer import PlainOptimizer
from app.training.precision import store_frozen
from app.training.trainer import peak_memory_bytes


@dataclass(frozen=True)
class TrialWork:
    """What a trial computes: a worker's rows."""

    config: TrainConfig
    batches: tuple[Batch, ...]
    """Of the steps: first the heaviest, which warms up too, then typical ones."""
    validation: tuple[Batch, ...]
    """The heaviest batch of held-out records, where there are any."""
    plan: loop.Plan
    """As a worker has it, over these steps, with one evaluation at the end."""


@dataclass(frozen=True)
class Trial:
    process_bytes: int
    """Before the model; none on a GPU."""
    peak_bytes: int
    """Of the process, or on a GPU of what torch allocated there."""
    step_s: float
    """Of a typical step."""
    evaluation_s: float
    """Of the batch of held-out records."""


def run_trial(work: TrialWork) -> Trial:
    """
    Raises:
        UserError: the process was killed, or the loss diverged.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure, work).result()
    except BrokenProcessPool:
        raise UserError(
            "the trial's process was killed, most likely because memory was short; lower micro_batch_size, or set "
            "gradient_checkpointing=true"
        ) from None
    except FloatingPointError as error:
        raise UserError(str(error)) from None


def measure(work: TrialWork) -> Trial:
    """The trial itself; its process should do nothing else."""
    config = work.config
    device = torch.device("cuda" if config.workers.gpus else "cpu")
    torch.set_num_threads(config.workers.threads)
    _begin_as_a_worker(work, device)
    process_bytes = 0 if device.type == "cuda" else _resident_bytes("VmRSS")
    model = load_decoder(model_folder(config.model))
    torch.manual_seed(config.seed)
    set_up(model, config)
    if config.compile:
        model.compile_blocks()
    model.to(device)
    store_frozen(model, config.precision, device)
    steps: list[Metrics] = []
    evaluations: list[float] = []

    def validation() -> Iterator[Batch]:
        for batch in work.validation:
            started = time.perf_counter()
            yield batch
            evaluations.append(time.perf_counter() - started)  # the loop is back for more

    loop.run(
        model,
        PlainOptimizer(model, config.optimizer),
        plan=work.plan,
        start_step=0,
        batches=iter(work.batches),
        validation=validation,
        report=steps.append,
        save=lambda step, metrics: None,
    )
    times = [row["step_s"] for row in steps if row["step"] > 1]
    return Trial(
        process_bytes=process_bytes,
        peak_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident_bytes("VmHWM"),
        step_s=sum(times) / len(times),
        evaluation_s=evaluations[-1] if evaluations else 0.0,
    )


def _begin_as_a_worker(work: TrialWork, device: torch.device) -> None:
    """Import what a worker imports, and let torch load what the first backward pass needs."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import_deepspeed()
    import ray.train.torch  # noqa: F401

    import app.training.feeding  # noqa: F401

    with torch.device("meta"):
        shapes = empty_decoder(model_folder(work.config.model))
    loop.training_attention(shapes, device=device, precision="fp32", is_packed=work.plan.is_packed)


def _resident_bytes(key: str) -> int:
    """VmRSS, resident memory now, or VmHWM, at its peak; where the system does not tell, the peak for either.

    Not `getrusage`, whose peak begins at that of the process which started this one.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")]
    return found[0] if found else peak_memory_bytes()
