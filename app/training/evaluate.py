"""`pacos evaluate`: a model, with or without a delta, on held-out records. Scored in Ray Data tasks."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from app.assets import model_folder
from app.atomic import write_text
from app.config.schema import EvaluateConfig
from app.data.batches import collate
from app.data.shards import COLUMNS, Manifest, read_manifest
from app.data.tokenization import Tokenizer, load_tokenizer
from app.engine.engine import Engine
from app.engine.sampling import Sampling
from app.errors import UserError
from app.methods.delta import Delta, check_base, fold_delta, read_delta
from app.models.checkpoints import load_decoder, weights_hash
from app.models.decoder import Decoder
from app.ray_cluster import on_all_cpus, thread_environment
from app.training.compatibility import check_fits
from app.training.loss import masked_nll
from app.training.precision import autocast

SAMPLE_TOKENS = 80


@dataclass(frozen=True)
class Sample:
    prompt: str
    reference: str
    answer: str
    """The model's, greedy."""


@dataclass(frozen=True)
class Evaluation:
    records: int
    tokens: int
    """Response tokens, the end of text among them: those that the loss is over."""
    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float
    """Of response text; comparable between tokenizers, which loss and perplexity are not."""
    samples: list[Sample]


def evaluate(config: EvaluateConfig, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Evaluation:
    """Score the split and answer a few of its prompts; Ray is initialised.

    Raises:
        UserError: data, model and delta do not fit together, or the split is empty.
    """
    import ray.data

    manifest, tokenizer = check_inputs(config)
    total = min(manifest.num_rows(config.split), config.max_records or 2**62)
    if not total:
        raise UserError(f"data={config.data!r} has no {config.split} records; prepare it with validation_fraction > 0")
    model = load_model(config)  # here first, so that a mistake in model or delta is told before actors start
    rows = on_all_cpus(ray.data.read_parquet(manifest.files(config.split)))
    rows.context.execution_options.preserve_order = True  # so that max_records means the same ones each time
    if config.max_records:
        rows = rows.limit(config.max_records)
    scored = rows.map_batches(
        _score,
        fn_kwargs={"config": config},
        batch_size=config.batch_size,
        batch_format="numpy",
        compute=ray.data.TaskPoolStrategy(size=config.workers.count),
        num_cpus=config.workers.cpus,
        num_gpus=config.workers.gpus,
        runtime_env={"env_vars": thread_environment(config.workers)},
    )
    nll, tokens, num_bytes, records, done = 0.0, 0, 0, 0, 0
    for row in scored.iter_rows():
        nll, tokens = nll + row["nll"], tokens + int(row["tokens"])
        num_bytes, records = num_bytes + int(row["bytes"]), records + int(row["records"])
        done += int(row["rows"])
        progress(done, total)
    loss = nll / tokens
    result = Evaluation(
        records=records,
        tokens=tokens,
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=nll / math.log(2) / max(1, num_bytes),
        samples=answer_samples(model, config, manifest, tokenizer),
    )
    if config.output:
        write_text(Path(config.output), json.dumps({"config": config.model_dump(), **asdict(result)}, indent=2) + "\n")
    return result


@torch.no_grad()
def _score(columns: dict[str, np.ndarray], *, config: EvaluateConfig) -> dict[str, list[float]]:
    """A batch of records to sums of -log p, in a Ray Data task. Only sums leave it, never logits."""
    device, model, tokenizer = _model_on_worker(config)
    batch = collate(*(list(columns[name]) for name in COLUMNS)).to(device)
    with autocast(device, config.precision):
        nll, count = masked_nll(model, batch)
    responses = [ids[mask] for ids, mask in zip(columns["input_ids"], columns["loss_mask"], strict=True)]
    num_bytes = sum(len(tokenizer.decode(ids.tolist()).encode()) for ids in responses)
    records = sum(map(len, columns["lengths"]))
    return {
        "nll": [nll.item()],
        "tokens": [count.item()],
        "bytes": [num_bytes],
        "records": [records],
        "rows": [len(responses)],
    }


@functools.lru_cache(maxsize=1)
def _model_on_worker(config: EvaluateConfig) -> tuple[torch.device, Decoder, Tokenizer]:
    """Loaded once per worker process, which scores many batches."""
    torch.set_num_threads(config.workers.threads)
    device = torch.device("cuda" if config.workers.gpus else "cpu")
    return device, load_model(config).to(device), load_tokenizer(model_folder(config.model))


def check_inputs(config: EvaluateConfig) -> tuple[Manifest, Tokenizer]:
    """The data's manifest and the model's tokenizer.

    Raises:
        UserError: data, model and delta do not fit together.
    """
    manifest = read_manifest(config.data)
    delta = read_delta(Path(config.delta)) if config.delta else None
    tokenizer = check_fits(
        manifest, data=config.data, model=config.model, method=delta.method if delta is not None else None
    )
    if delta is not None:
        _check_template(config, manifest, delta)
    return manifest, tokenizer


def _check_template(config: EvaluateConfig, manifest: Manifest, delta: Delta) -> None:
    """A delta's loss on prompts that it was not trained to read says nothing of it."""
    trained = delta.metadata.get("template")
    if trained and trained != manifest.values["template"]:
        raise UserError(
            f"delta={config.delta!r} was trained with the template {trained['type']!r} and data={config.data!r} is "
            f"prepared with {manifest.values['template']['type']!r}; prepare it with the delta's"
        )


def load_model(config: EvaluateConfig) -> Decoder:
    folder = model_folder(config.model)
    model = load_decoder(folder)
    if config.delta:
        delta = read_delta(Path(config.delta))
        check_base(
            delta,
            config.delta,
            base_hash=weights_hash(folder),
            tokenizer_hash=load_tokenizer(folder).fingerprint(),
        )
        fold_delta(model, delta)
    return model


def answer_samples(model: Decoder, config: EvaluateConfig, manifest: Manifest, tokenizer: Tokenizer) -> list[Sample]:
    """Greedy answers to the first prompts of the split, all in one batch, here in the driver."""
    exchanges = _first_exchanges(manifest.files(config.split), config.samples)
    if not exchanges:
        return []
    engine = Engine(model, max_batch_size=len(exchanges), max_queue=len(exchanges))
    answers: dict[int, list[int]] = {}
    rows = []
    for prompt, reference in exchanges:
        if len(prompt) < model.max_length:
            sampling = Sampling(max_tokens=SAMPLE_TOKENS, stop_ids=frozenset([tokenizer.end_id]))
            request_id = engine.add_request(prompt, sampling)
            answers[request_id] = []
            rows.append((request_id, prompt, reference))
    while engine.has_work:
        for event in engine.step():
            if event.token is not None:
                answers[event.request_id].append(event.token)
    return [
        Sample(
            tokenizer.decode(prompt).strip(),
            tokenizer.decode(reference).strip(),
            tokenizer.decode(answers[request_id]).strip(),
        )
        for request_id, prompt, reference in rows
    ]


def _first_exchanges(files: list[str], count: int) -> list[tuple[list[int], list[int]]]:
    """The first prompt and response of each of the first documents."""
    found: list[tuple[list[int], list[int]]] = []
    for file in files:
        for row in pq.read_table(file).to_pylist() if len(found) < count else ():
            ids, mask, start = np.asarray(row["input_ids"]), np.asarray(row["loss_mask"]), 0
            for length in row["lengths"]:
                document, in_loss = ids[start : start + length], mask[start : start + length]
                first = int(in_loss.argmax())
                last = first + int(np.append(~in_loss[first:], True).argmax())
                found.append((document[:first].tolist(), document[first:last].tolist()))
                start += length
    return found[:count]
