"""`pacos train --dry-run`: what a run will need and take, from its settings, its data and three of its steps.

Writes nothing into the run's folder, and needs no Ray.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import save_file

from app.assets import model_folder
from app.config.schema import TrainConfig
from app.data.batches import Batch, batches_by_length, collate, filled_length
from app.data.shards import COLUMNS
from app.models.attention import document_lengths
from app.models.checkpoints import empty_decoder
from app.models.decoder import Decoder
from app.training.fine_tuning import Job, loop_plan, micro_batches, set_up
from app.training.loss import is_computed_end_to_end
from app.training.memory import Memory, Shape, plain_memory, worker_memory
from app.training.precision import store_frozen
from app.training.run_log import check_is_new
from app.training.trial import Trial, TrialWork, run_trial

TRIAL_STEPS = 3
_SAMPLE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Share:
    """One worker's rows of one step."""

    step: int
    worker: int
    positions: int
    """Tokens that are computed, padding among them where it is."""


@dataclass(frozen=True)
class Forecast:
    """What `pacos train` will need and take. Seconds and the trial are None where it was not run."""

    config: TrainConfig
    trained_parameters: int
    total_parameters: int
    steps: int
    epochs: float
    tokens: int
    """Of all steps, without padding."""
    loss_tokens: int
    worker: Memory
    available_bytes: int
    """Of this machine, or of its GPU."""
    trial: Trial | None
    expected_trial: Memory
    """What arithmetic says of the trial."""
    evaluations: int
    checkpoints: int
    step_s: float | None = None
    """Of a mean step."""
    evaluation_s: float | None = None
    """Of one evaluation, all held-out records."""
    checkpoint_s: float | None = None

    @property
    def total_s(self) -> float | None:
        """Of steps, evaluations and checkpoints, without the start of Ray and its workers."""
        if self.step_s is None or self.evaluation_s is None or self.checkpoint_s is None:
            return None
        return self.steps * self.step_s + self.evaluations * self.evaluation_s + self.checkpoints * self.checkpoint_s

    @property
    def cost(self) -> float | None:
        """Of all workers for that time; None where a worker has no price."""
        price = self.config.workers.price_per_hour
        return None if price is None or self.total_s is None else price * num_workers(self.config) * self.total_s / 3600

    @property
    def needed_bytes(self) -> int:
        """On this machine: all workers', or one's where each has a GPU."""
        return self.worker.total * (1 if self.config.workers.gpus else num_workers(self.config))

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.available_bytes


def num_workers(config: TrainConfig) -> int:
    return config.workers.least


def dry_run(job: Job, *, resume: bool = False, progress: Callable[[str], None] = lambda stage: None) -> Forecast:
    """Estimate memory; where it fits, run the trial and tell the time.

    Raises:
        UserError: as a run would.
    """
    config = job.config
    if not resume:
        check_is_new(Path(config.output))
    progress("reading the data")
    window = next(job.feed.windows())
    rows = job.feed.read(window)
    shares = shares_of(job, rows)
    heaviest = max(shares, key=lambda share: share.positions)
    mean_positions = sum(share.positions for share in shares) / len(shares)
    scale = job.total_steps / window.num_steps
    progress("counting memory")
    held_out = heaviest_validation_batch(job)
    plain = _plain_memory(job, batch_of(job, rows, heaviest), process=0)
    forecast = Forecast(
        config=config,
        trained_parameters=job.trained_count,
        total_parameters=job.total_count,
        steps=job.total_steps,
        epochs=job.total_steps / job.feed.steps_per_epoch,
        tokens=round(scale * _num_tokens(rows)),
        loss_tokens=round(scale * _num_loss_tokens(rows)),
        worker=_worker_memory(plain, config),
        available_bytes=_available_bytes(config),
        trial=None,
        expected_trial=plain,
        evaluations=1 + _times_due(job.total_steps, config.eval_every) if held_out else 0,
        checkpoints=_times_due(job.total_steps, config.save_every),
    )
    if not forecast.fits or (config.workers.gpus and not torch.cuda.is_available()):
        return forecast
    progress("trying three steps")
    typical = sorted(shares, key=lambda share: abs(share.positions - mean_positions))[: TRIAL_STEPS - 1]
    typical = (typical * TRIAL_STEPS)[: TRIAL_STEPS - 1]  # a run of one step has no other
    plan = loop_plan(job, workers=num_workers(config))
    work = TrialWork(
        config=config,
        batches=tuple(batch_of(job, rows, share) for share in (heaviest, *typical)),
        validation=held_out,
        plan=replace(plan, total_steps=TRIAL_STEPS, eval_every=TRIAL_STEPS, save_every=TRIAL_STEPS),
    )
    trial = run_trial(work)
    crowding = _crowding(config)
    return replace(
        _corrected(forecast, trial),
        step_s=crowding * trial.step_s * mean_positions * len(typical) / sum(share.positions for share in typical),
        evaluation_s=crowding * _evaluation_s(job, held_out, trial),
        checkpoint_s=_write_s(3 * plain.trained_weights),
    )


def shares_of(job: Job, rows: pa.Table) -> list[Share]:
    """Every worker's share of every step of a window of `rows`."""
    config = job.config
    workers, size = num_workers(config), config.batch_size
    lengths = pc.list_value_length(rows["input_ids"]).to_numpy()
    is_end_to_end = _is_end_to_end(config)
    found = []
    for step in range(len(lengths) // size):
        for worker in range(workers):
            mine = lengths[_row_numbers(step, worker, size=size, workers=workers)]
            padded = len(mine) * job.feed.width(int(mine.max()))
            found.append(Share(step, worker, filled_length(int(mine.sum())) if is_end_to_end else padded))
    return found


def batch_of(job: Job, rows: pa.Table, share: Share) -> Batch:
    """What the worker gets of that step."""
    numbers = _row_numbers(share.step, share.worker, size=job.config.batch_size, workers=num_workers(job.config))
    mine = rows.take(pa.array(numbers))
    columns = [list(mine[name].to_numpy()) for name in COLUMNS]
    return collate(*columns, pad_to=job.feed.width(max(map(len, columns[0]))))


def _row_numbers(step: int, worker: int, *, size: int, workers: int) -> np.ndarray:
    """As `Feed` deals them: row i of a window goes to worker i mod `workers`."""
    first = step * size
    return np.arange(first + (worker - first) % workers, first + size, workers)


def heaviest_validation_batch(job: Job) -> tuple[Batch, ...]:
    """The last of a worker's held-out batches, which go by length; none where no records are held out."""
    table = job.manifest.read("validation")
    if not table.num_rows:
        return ()
    size = job.config.micro_batch_size or max(1, job.config.batch_size // num_workers(job.config))
    longest = np.argsort(pc.list_value_length(table["input_ids"]).to_numpy())[-size:]
    mine = table.take(pa.array(longest))
    return tuple(batches_by_length(zip(*(mine[name].to_numpy() for name in COLUMNS), strict=True), size=size))


def _plain_memory(job: Job, batch: Batch, *, process: int) -> Memory:
    config = job.config
    parts = micro_batches(config, workers=num_workers(config))
    device = "cuda" if config.workers.gpus and torch.cuda.is_available() else "cpu"
    pieces = [piece.end_to_end() if _is_end_to_end(config) else piece for piece in batch.split(parts)]
    largest = max(pieces, key=lambda piece: piece.input_ids.numel())
    shape = Shape(
        rows=len(largest.input_ids),
        length=largest.input_ids.shape[1],
        loss_tokens=max(piece.loss_tokens for piece in pieces),
        document_lengths=None if largest.documents is None else tuple(document_lengths(largest.documents)),
        micro_batches=parts,
    )
    return plain_memory(_shapes(config, device), shape, precision=config.precision, device=device, process=process)


def _is_end_to_end(config: TrainConfig) -> bool:
    return is_computed_end_to_end(config.attention, "cuda" if config.workers.gpus else "cpu")


def _shapes(config: TrainConfig, device: str) -> Decoder:
    with torch.device("meta"):
        model = empty_decoder(model_folder(config.model))
        set_up(model, config)
        store_frozen(model, config.precision, torch.device(device))
    return model


def _worker_memory(plain: Memory, config: TrainConfig) -> Memory:
    return worker_memory(
        plain,
        zero_stage=config.deepspeed.zero_stage,
        workers=num_workers(config),
        is_gpu=config.workers.gpus > 0,
        allocator=plain.allocator,
    )


def _corrected(forecast: Forecast, trial: Trial) -> Forecast:
    """With what the trial measured beyond arithmetic, which a worker will hold too."""
    expected = replace(forecast.expected_trial, process=trial.process_bytes)
    expected = replace(expected, allocator=trial.peak_bytes - expected.total)
    return replace(forecast, trial=trial, expected_trial=expected, worker=_worker_memory(expected, forecast.config))


def _evaluation_s(job: Job, batches: tuple[Batch, ...], trial: Trial) -> float:
    """Of one evaluation: the trial's batch, for as many tokens as each worker has."""
    if not batches:
        return 0.0
    tokens = job.manifest.values["splits"]["validation"]["tokens"] / num_workers(job.config)
    return trial.evaluation_s * tokens / sum(batch.num_tokens for batch in batches)


def _times_due(steps: int, every: int) -> int:
    """How often something happens that is due every so many steps and after the last."""
    return -(-steps // every)


def _crowding(config: TrainConfig) -> float:
    """By how much workers that share this machine's processors slow each other down; a GPU's do not."""
    threads = num_workers(config) * config.workers.threads
    return 1.0 if config.workers.gpus else max(1.0, threads / (os.cpu_count() or 1))


def _write_s(num_bytes: int) -> float:
    """Seconds to write a checkpoint of that size, from a smaller one written to the folder for temporary files."""
    sample = torch.zeros(min(num_bytes, _SAMPLE_BYTES) // 4)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        save_file({"sample": sample}, Path(folder) / "sample.safetensors")
        return (time.perf_counter() - started) * num_bytes / max(1, sample.nbytes)


def _available_bytes(config: TrainConfig) -> int:
    if config.workers.gpus and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(physical, int(text)) if text.isdecimal() else physical


def _num_tokens(rows: pa.Table) -> int:
    return pc.sum(pc.list_value_length(rows["input_ids"])).as_py()


def _num_loss_tokens(rows: pa.Table) -> int:
    return pc.sum(pc.list_flatten(rows["loss_mask"])).as_py()
