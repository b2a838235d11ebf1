"""`pacos train`: shards and a model in, a run folder with a delta out.

OUTPUT/config.json        the resolved configuration
OUTPUT/metrics.jsonl      loss, learning rate, … of every step
OUTPUT/checkpoints/       to resume from
OUTPUT/delta/             the result (`model/` after full fine-tuning)
OUTPUT/report.html, loss.png, result.json, samples.json, mlflow.json, worker_hours.json
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.assets import model_folder
from app.atomic import replaced_folder, told_if_unwritable
from app.config.methods import name_of
from app.config.schema import TrainConfig
from app.data.batches import Batch, batches_by_length, empty_batch
from app.data.feed import Feed
from app.data.shards import COLUMNS, Manifest, read_manifest
from app.data.tokenization import TOKENIZER_FILES, copy_tokenizer
from app.errors import UserError
from app.methods import apply_method, without_training_parts
from app.methods.delta import DELTA_FILES, Delta, load_trained, write_delta
from app.methods.description import describe
from app.models.checkpoints import (
    MODEL_FILES,
    PROVENANCE_FILE,
    empty_decoder,
    load_decoder,
    save_decoder,
    weights_hash,
    write_provenance,
)
from app.models.decoder import Decoder
from app.tracking.run import check_tracking
from app.training import loop
from app.training.checkpoint_store import CheckpointStore
from app.training.compatibility import check_fits
from app.training.deepspeed import DeepSpeedOptimizer
from app.training.loop import Metrics
from app.training.optimizer import trained_parameters
from app.training.recording import log_warning, recorded
from app.training.run_log import RunLog, first, last
from app.training.samples import sample_after, sample_before
from app.training.trainer import check_attention, run_on_workers, train_on_worker
from app.training.workers import rank, world_size


@dataclass(frozen=True)
class Job:
    """A checked configuration with what follows from it."""

    config: TrainConfig
    manifest: Manifest
    feed: Feed
    trained_count: int
    total_count: int

    @property
    def total_steps(self) -> int:
        return self.feed.total_steps

    @property
    def checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self.config.checkpoints or Path(self.config.output) / "checkpoints")

    @property
    def result(self) -> Path:
        return Path(self.config.output) / ("model" if self.config.method.type == "full" else "delta")


def plan_job(config: TrainConfig) -> Job:
    """Check everything that can be checked before a worker starts.

    Raises:
        UserError: data, model and method do not fit together, or the tracking server does not answer.
    """
    manifest = read_manifest(config.data)
    check_fits(manifest, data=config.data, model=config.model, method=config.method)
    total_steps = count_steps(config, manifest)
    with torch.device("meta"):
        model = empty_decoder(model_folder(config.model))
        total_count = describe(model).parameters
        set_up(model, config)
    check_attention(model, workers=config.workers, precision=config.precision, is_packed=is_packed(manifest))
    check_tracking(config.tracking, output=config.output)
    return Job(
        config,
        manifest,
        Feed.of(manifest, batch_size=config.batch_size, total_steps=total_steps, seed=config.seed),
        trained_count=sum(parameter.numel() for parameter in trained_parameters(model).values()),
        total_count=total_count,
    )


def count_steps(config: TrainConfig, manifest: Manifest) -> int:
    """Of a whole run.

    Raises:
        UserError: there are not enough rows for one.
    """
    steps_per_epoch = manifest.num_rows("train") // config.batch_size
    if not steps_per_epoch:
        raise UserError(f"batch_size={config.batch_size} is more than the {manifest.num_rows('train')} training rows")
    return min(config.epochs * steps_per_epoch, config.max_steps or 2**62)


def fine_tune(
    job: Job,
    *,
    resume: bool = False,
    on_metrics: Callable[[Metrics], None] = lambda metrics: None,
    warn: Callable[[str], None] = log_warning,
    parent: str | None = None,
    until: int | None = None,
) -> dict[str, Any]:
    """Train on the cluster; Ray is initialised. Returns a summary, which also stands in `result.json`.

    `warn` is told what went wrong beside the training, which goes on; `parent` is as in `recorded`. With `until` the
    run is left after that step, saved, for `resume` to go on, and the summary is empty.

    Raises:
        UserError: the output folder holds a run and `resume` is false, or none that can be resumed, or one that runs;
            or MLflow does not answer.
        Interrupted: a signal came; the step that ran then is saved.
    """
    from app.training.feeding import FeedConfig

    config, output = job.config, Path(job.config.output)
    inputs = inputs_of(job)
    with recorded(
        config,
        inputs=inputs,
        checkpoints=job.checkpoints,
        resume=resume,
        title=title_of(job),
        on_metrics=on_metrics,
        warn=warn,
        parent=parent,
    ) as recording:
        run_on_workers(
            _worker,
            {"job": job, "inputs": inputs, "until": until},
            workers=config.workers,
            output=output,
            max_failures=config.max_failures,
            on_metrics=recording.add,
            feeding=FeedConfig(job.feed, checkpoints=job.checkpoints, is_elastic=config.workers.is_elastic),
        )
        if until is not None:
            return {}
        delta = None if config.method.type == "full" else job.result
        return recording.finish(figures_of(job, recording.log), delta=delta, register_as=config.register_as)


def inputs_of(job: Job) -> str:
    """A hash of what the run reads."""
    return f"{job.manifest.content_hash()} {weights_hash(model_folder(job.config.model))}"


def title_of(job: Job) -> str:
    return f"{name_of(job.config.method)} on {job.config.model}"


def figures_of(job: Job, log: RunLog) -> dict[str, Any]:
    """What the run's summary says of its training."""
    rows = log.rows
    steps = [row for row in rows if "step_s" in row][1:]  # the first step warms caches up
    return {
        "steps": job.total_steps,
        "trained_parameters": job.trained_count,
        "loss_first": first(rows, "loss"),
        "loss_last": last(rows, "loss"),
        "eval_loss_before": first(rows, "eval_loss"),
        "eval_loss_after": last(rows, "eval_loss"),
        "perplexity_before": first(rows, "perplexity"),
        "perplexity_after": last(rows, "perplexity"),
        "precision": first(rows, "precision"),
        "kernels": first(rows, "kernels"),
        "tokens_per_s": sum(row["tokens"] for row in steps) / max(1e-9, sum(row["step_s"] for row in steps)),
        "peak_worker_bytes": last(rows, "peak_worker_bytes"),
        "result": str(job.result),
    }


def _worker(payload: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    from app.training.feeding import worker_batches

    job: Job = payload["job"]
    config = job.config
    torch.set_num_threads(config.workers.threads)
    folder = model_folder(config.model)
    model = load_decoder(folder)
    if rank() == 0:
        sample_before(model, config, job.manifest, folder=folder)
    torch.manual_seed(config.seed)  # every worker draws the same initial weights
    set_up(model, config)
    if config.compile:
        model.compile_blocks()
    validation = validation_batches(job)
    metrics = train_on_worker(
        model,
        plan=loop_plan(job, workers=world_size()),
        make_optimizer=lambda model, checkpoint: DeepSpeedOptimizer(
            model,
            config.optimizer,
            deepspeed=config.deepspeed,
            resume=checkpoint,
        ),
        checkpoints=job.checkpoints,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        about=lambda step: about_step(job, step, inputs=payload["inputs"]),
        batches=lambda start_step: worker_batches(job.feed, start_step=start_step),
        validation=lambda: validation,
        channel=payload["channel"],
        until=payload["until"],
    )
    if rank() == 0 and payload["until"] is None:
        trained = _trained_model(job)
        sample_after(trained, config, job.manifest, folder=folder)
        with told_if_unwritable(job.result):
            write_result(job, trained, metrics)


def about_step(job: Job, step: int, *, inputs: str) -> dict[str, Any]:
    """What a checkpoint says of the run, and of its place in the data after `step` steps."""
    return {**job.feed.position(step), "seed": job.config.seed, "inputs": inputs}


def set_up(model: Decoder, config: TrainConfig) -> None:
    """Make `model`, which may lie on the `meta` device, what the run trains, in place."""
    apply_method(model, config.method)
    model.attention = config.attention
    model.checkpoint_blocks = config.gradient_checkpointing


def loop_plan(job: Job, *, workers: int) -> loop.Plan:
    config = job.config
    return loop.Plan(
        total_steps=job.total_steps,
        eval_every=config.eval_every,
        save_every=config.save_every,
        optimizer=config.optimizer,
        precision=config.precision,
        seed=config.seed,
        is_packed=is_packed(job.manifest),
        micro_batches=micro_batches(config, workers=workers),
        label_smoothing=config.label_smoothing,
        changes=config.changes,
    )


def micro_batches(config: TrainConfig, *, workers: int) -> int:
    """The same on every worker, also on one with a row less."""
    rows = -(-config.batch_size // workers)
    return -(-rows // (config.micro_batch_size or rows))


def is_packed(manifest: Manifest) -> bool:
    return manifest.values["config"]["layout"]["type"] == "packed"


def validation_batches(job: Job) -> list[Batch]:
    """This worker's share of the held-out records, by length, so that little is padding; as many batches on each.

    Kept in memory, as ids: reading them anew for every evaluation costs more.
    """
    table = job.manifest.read("validation")
    columns = (table[name].to_numpy()[rank() :: world_size()] for name in COLUMNS)
    mine = list(zip(*columns, strict=True))
    size = job.config.micro_batch_size or max(1, job.config.batch_size // world_size())
    batches = list(batches_by_length(mine, size=size))
    largest_share = -(-table.num_rows // world_size())
    return batches + [empty_batch()] * (-(-largest_share // size) - len(batches))


def _trained_model(job: Job) -> Decoder:
    """The model with the weights of the last step's checkpoint: on the workers themselves they may lie in parts."""
    model = load_decoder(model_folder(job.config.model))
    apply_method(model, job.config.method)
    checkpoint = job.checkpoints.latest()
    assert checkpoint is not None and checkpoint.step == job.total_steps  # the last step is always saved
    load_trained(model, checkpoint.weights)
    return model


def write_result(job: Job, model: Decoder, metrics: Metrics) -> None:
    """The trained delta, or the whole model after full fine-tuning, in one rename."""
    config = job.config
    if config.method.type == "full":
        with replaced_folder(job.result, contents=(*MODEL_FILES, *TOKENIZER_FILES, PROVENANCE_FILE)) as staging:
            save_decoder(staging, model)
            copy_tokenizer(model_folder(config.model), staging)
            write_provenance(staging, {"template": job.manifest.values["template"]})
        return
    method = without_training_parts(model, config.method)
    weights = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
    metadata = {
        "base": config.model,
        "base_hash": weights_hash(model_folder(config.model)),
        "tokenizer_hash": job.manifest.values["tokenizer_hash"],
        "template": job.manifest.values["template"],
        "config": config.model_dump(mode="json"),
        "metrics": {name: metrics[name] for name in ("step", "loss", "eval_loss", "perplexity") if name in metrics},
    }
    with replaced_folder(job.result, contents=DELTA_FILES) as staging:
        write_delta(staging, Delta(method, weights, metadata))
