"""`pacos pretrain`: text in, a byte-level BPE tokenizer and a GPT-2-shaped model out.

OUTPUT/config.json        the resolved configuration
OUTPUT/metrics.jsonl      loss and, on held-out text, bits per byte
OUTPUT/checkpoints/       to resume from
OUTPUT/model/             the model of the lowest held-out loss so far, as a Hugging Face GPT-2 folder
OUTPUT/report.html, loss.png, result.json, mlflow.json, worker_hours.json
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.assets import model_folder
from app.atomic import replaced_folder, told_if_unwritable
from app.config.schema import PretrainConfig
from app.data.batches import Batch
from app.data.corpus import TokenStream, read_documents, split_documents
from app.data.tokenization import TOKENIZER_FILES, Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from app.models.checkpoints import MODEL_FILES, load_decoder, save_decoder, weights_hash
from app.models.decoder import Decoder, DecoderConfig
from app.tracking.run import check_tracking
from app.training.checkpoint_store import CheckpointStore
from app.training.initial_model import with_shape_of_initial
from app.training.loop import Metrics, Plan
from app.training.muon import MuonOptimizer
from app.training.recording import log_warning, recorded
from app.training.trainer import check_attention, run_on_workers, train_on_worker
from app.training.workers import rank, world_size

_FIGURES = "pretraining.json"


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream

    @property
    def validation_bytes_per_token(self) -> float:
        return self.validation.num_bytes / self.validation.num_tokens


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool = False,
    on_metrics: Callable[[Metrics], None] = lambda metrics: None,
    warn: Callable[[str], None] = log_warning,
) -> dict[str, Any]:
    """Train on the cluster; Ray is initialised. Returns a summary, which also stands in `result.json`.

    `warn` is told what went wrong beside the training, which goes on.

    Raises:
        UserError: a source cannot be read, or the output folder's state does not fit `resume`, or a run holds it, or
            MLflow does not answer.
        Interrupted: a signal came; the step that ran then is saved.
    """
    check_sources(config)
    config = with_shape_of_initial(config)
    output = Path(config.output)
    inputs = _inputs(config)
    title = f"pretraining, {config.num_layers} layers of width {config.width}"
    with recorded(
        config,
        inputs=inputs,
        checkpoints=_checkpoints(config),
        resume=resume,
        title=title,
        on_metrics=on_metrics,
        warn=warn,
    ) as recording:
        run_on_workers(
            _worker,
            {"config": config, "inputs": inputs},
            workers=config.workers,
            output=output,
            max_failures=2,
            on_metrics=recording.add,
        )
        figures = json.loads((output / "model" / _FIGURES).read_text())
        return recording.finish({**figures, "result": str(output / "model")})


def check_sources(config: PretrainConfig) -> None:
    """Read the first document of each source, and try the kernels, so that a mistake is told before any worker starts.

    Raises:
        UserError: a source or the initial model cannot be read or does not fit, or a kernel cannot train here.
    """
    for source in config.sources:
        next(read_documents(source), None)
    config = with_shape_of_initial(config)
    with torch.device("meta"):
        model = new_model(config, vocab_size=config.vocab_size)
    check_attention(model, workers=config.workers, precision=config.precision, is_packed=False)
    check_tracking(config.tracking, output=config.output)


def _inputs(config: PretrainConfig) -> str:
    """A hash of all that the run reads."""
    sources = [hashlib.sha256(Path(source).read_bytes()).hexdigest() for source in config.sources]
    return "".join([*sources, *([weights_hash(model_folder(config.initial_model))] if config.initial_model else [])])


def _worker(payload: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    config: PretrainConfig = payload["config"]
    torch.set_num_threads(config.workers.threads)
    corpus = load_corpus(config)
    model = first_model(config, corpus.tokenizer)
    output = Path(config.output)

    def keep_if_best(metrics: Metrics) -> None:
        if "eval_loss" not in metrics:  # saved because of Ctrl-C
            return
        file = output / "model" / _FIGURES
        best = json.loads(file.read_text())["eval_loss"] if file.exists() else math.inf
        if metrics["eval_loss"] < best:
            write_model(output / "model", model, corpus, metrics)

    train_on_worker(
        model,
        plan=plan(config),
        make_optimizer=lambda model, checkpoint: MuonOptimizer(model, config.optimizer, resume=checkpoint),
        checkpoints=_checkpoints(config),
        keep_last=1,
        about=lambda step: {**_position(corpus, config, step), "seed": config.seed, "inputs": payload["inputs"]},
        batches=lambda start_step: training_batches(corpus, config, start_step=start_step),
        validation=lambda: validation_batches(corpus, config),
        channel=payload["channel"],
        on_save=keep_if_best,
    )


def _checkpoints(config: PretrainConfig) -> CheckpointStore:
    return CheckpointStore(Path(config.output) / "checkpoints")


def _position(corpus: Corpus, config: PretrainConfig, step: int) -> dict[str, int]:
    """Where the data stands after `step` steps: whole epochs, and rows read of all."""
    return {"epoch": step // _steps_per_epoch(corpus, config), "rows": step * config.batch_size}


def _steps_per_epoch(corpus: Corpus, config: PretrainConfig) -> int:
    return max(1, corpus.train.rows_per_epoch // config.batch_size)


def write_model(folder: Path, model: Decoder, corpus: Corpus, metrics: Metrics) -> None:
    """Model, tokenizer and figures, in one rename. bf16: half the bytes, and no loss that a held-out text shows."""
    figures = {
        "step": metrics["step"],
        "eval_loss": metrics["eval_loss"],
        "bits_per_byte": metrics["eval_loss"] / math.log(2) / corpus.validation_bytes_per_token,
        "train_tokens": corpus.train.num_tokens,
        "validation_tokens": corpus.validation.num_tokens,
    }
    contents = (_FIGURES, *MODEL_FILES, *TOKENIZER_FILES)
    with told_if_unwritable(folder), replaced_folder(folder, contents=contents) as staging:
        save_decoder(staging, model, dtype=torch.bfloat16)
        save_tokenizer(corpus.tokenizer, staging)
        (staging / _FIGURES).write_text(json.dumps(figures, indent=2) + "\n")


def load_corpus(config: PretrainConfig) -> Corpus:
    """Documents of all sources, split, and a tokenizer, the initial model's or one learned from the training part.

    The same on every worker.
    """
    documents = [document for source in config.sources for document in read_documents(source)]
    train, validation = split_documents(documents, validation_fraction=config.validation_fraction)
    tokenizer = (
        load_tokenizer(model_folder(config.initial_model))
        if config.initial_model
        else train_tokenizer(train, vocab_size=config.vocab_size)
    )
    return Corpus(
        tokenizer,
        TokenStream(train, tokenizer, row_length=config.context_length),
        TokenStream(validation, tokenizer, row_length=config.context_length),
    )


def first_model(config: PretrainConfig, tokenizer: Tokenizer) -> Decoder:
    """What training starts from: the initial model, or random weights."""
    if config.initial_model is None:
        return new_model(config, vocab_size=tokenizer.vocab_size)
    model = load_decoder(model_folder(config.initial_model))
    model.attention = config.attention
    return model


def new_model(config: PretrainConfig, *, vocab_size: int) -> Decoder:
    model = Decoder(
        DecoderConfig(
            vocab_size=vocab_size,
            context_length=config.context_length,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            width=config.width,
            mlp_width=config.mlp_width or _mlp_width(config),
            norm=config.norm,
            positions=config.positions,
            activation=config.activation,
            num_kv_heads=config.num_kv_heads,
        )
    )
    model.attention = config.attention
    model.initialize(generator=torch.Generator().manual_seed(config.seed))
    return model


def _mlp_width(config: PretrainConfig) -> int:
    """As many weights as GPT-2's feed-forward layer has, in multiples of 64."""
    return 4 * config.width if config.activation != "swiglu" else -(-8 * config.width // (3 * 64)) * 64


def plan(config: PretrainConfig) -> Plan:
    return Plan(
        total_steps=config.steps,
        eval_every=config.eval_every,
        save_every=config.eval_every,
        optimizer=config.optimizer,
        precision=config.precision,
        seed=config.seed,
        is_packed=False,
    )


def training_batches(corpus: Corpus, config: PretrainConfig, *, start_step: int) -> Iterator[Batch]:
    """This worker's rows of every step from `start_step` on, epoch after epoch."""
    stream, step = corpus.train, start_step
    steps_per_epoch = _steps_per_epoch(corpus, config)
    while True:
        epoch, first = divmod(step, steps_per_epoch)
        rows = stream.epoch(epoch, seed=config.seed)
        for index in range(first, steps_per_epoch):
            of_step = rows[index * config.batch_size : (index + 1) * config.batch_size]
            yield _as_batch(of_step[rank() :: world_size()])
            step += 1


def validation_batches(corpus: Corpus, config: PretrainConfig) -> Iterable[Batch]:
    rows = corpus.validation.epoch(0, seed=0)[rank() :: world_size()]
    size = max(1, config.batch_size // world_size())
    return (_as_batch(rows[first : first + size]) for first in range(0, len(rows), size))


def _as_batch(rows: np.ndarray) -> Batch:
    ids = torch.from_numpy(rows.astype(np.int64))
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids.numel())
