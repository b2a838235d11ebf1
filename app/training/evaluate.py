"""`pacos evaluate`: a model, or deltas of it side by side, on held-out records. Scored in Ray Data tasks."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from app.assets import model_folder
from app.atomic import write_text
from app.config.methods import name_of
from app.config.schema import EvaluateConfig
from app.data.batches import collate
from app.data.shards import COLUMNS, Manifest, read_manifest
from app.data.tokenization import Tokenizer, load_tokenizer
from app.errors import UserError
from app.methods.delta import Delta, apply_delta, check_base, fold_delta, read_delta
from app.models.checkpoints import empty_decoder, load_decoder, weights_hash
from app.models.decoder import Decoder
from app.ray_cluster import on_all_cpus, thread_environment
from app.training.answers import Answer, answer, first_exchanges
from app.training.comparison_plot import plot_comparison
from app.training.compatibility import check_fits
from app.training.loss import masked_nll
from app.training.precision import autocast


@dataclass(frozen=True)
class Candidate:
    """The model alone, or with one delta."""

    name: str
    folder: str | None = None
    delta: Delta | None = None


@dataclass(frozen=True)
class EvaluationPlan:
    """A checked configuration with what it names, each delta read once."""

    config: EvaluateConfig
    manifest: Manifest
    candidates: list[Candidate]

    @property
    def num_rows(self) -> int:
        return min(self.manifest.num_rows(self.config.split), self.config.max_records or 2**62)


@dataclass(frozen=True)
class Evaluation:
    """One candidate's figures."""

    name: str
    delta: str | None
    method: str | None
    trained_parameters: int
    records: int
    tokens: int
    """Response tokens, the end of text among them: those that the loss is over."""
    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float
    """Of response text; comparable between tokenizers, which loss and perplexity are not."""
    answers: int
    rouge_l: float | None
    """Mean over the answers, from 0 to 1."""
    exact_match: float | None
    """Share of the answers, from 0 to 1."""
    samples: list[Answer]


def plan_evaluation(config: EvaluateConfig) -> EvaluationPlan:
    """Check everything that can be checked before a task starts.

    Raises:
        UserError: data, model and a delta do not fit together, naming which; or the split is empty.
    """
    manifest = read_manifest(config.data)
    tokenizer = check_fits(manifest, data=config.data, model=config.model)
    folders = (config.delta,) if config.delta else config.deltas
    base_hash = weights_hash(model_folder(config.model)) if folders else ""
    candidates = [] if config.delta else [Candidate(Path(config.model).name)]
    for folder, name in zip(folders, short_names(folders), strict=True):
        delta = read_delta(Path(folder))
        check_base(delta, folder, base_hash=base_hash, tokenizer_hash=tokenizer.fingerprint())
        _check_template(folder, delta, config, manifest)
        _check_shapes(folder, delta, config, manifest)
        candidates.append(Candidate(name, folder, delta))
    if not manifest.num_rows(config.split):
        raise UserError(f"data={config.data!r} has no {config.split} records; prepare it with validation_fraction > 0")
    return EvaluationPlan(config, manifest, candidates)


def short_names(folders: tuple[str, ...]) -> list[str]:
    """What tells folders apart: `lora` and `bitfit` of `runs/lora/delta` and `runs/bitfit/delta`."""
    parts = [list(Path(folder).parts) for folder in folders]
    if all(len(path) > 1 and path[-1] == "delta" for path in parts):
        parts = [path[:-1] for path in parts]
    while all(len(path) > 1 for path in parts) and len({path[0] for path in parts}) == 1:
        parts = [path[1:] for path in parts]
    return ["/".join(path) for path in parts]


def _check_template(folder: str, delta: Delta, config: EvaluateConfig, manifest: Manifest) -> None:
    """A delta's loss on prompts that it was not trained to read says nothing of it."""
    trained = delta.metadata.get("template")
    if trained and trained != manifest.values["template"]:
        raise UserError(
            f"delta={folder!r} was trained with the template {trained['type']!r} and data={config.data!r} is "
            f"prepared with {manifest.values['template']['type']!r}; prepare it with the delta's"
        )


def _check_shapes(folder: str, delta: Delta, config: EvaluateConfig, manifest: Manifest) -> None:
    try:
        check_fits(manifest, data=config.data, model=config.model, method=delta.method)
        with torch.device("meta"):
            apply_delta(empty_decoder(model_folder(config.model)), delta)
    except UserError as error:
        raise UserError(f"delta={folder!r}: {error}") from None


def evaluate(
    plan: EvaluationPlan, *, progress: Callable[[int, int, str], None] = lambda done, total, note: None
) -> list[Evaluation]:
    """Score the split and answer its first prompts with each candidate in turn; Ray is initialised.

    `progress(done, total, name)` counts rows scored and prompts answered, over all candidates.
    """
    config = plan.config
    exchanges = first_exchanges(plan.manifest, config.split, config.answers)
    total, done = len(plan.candidates) * (plan.num_rows + len(exchanges)), 0

    def advance(count: int, name: str) -> None:
        nonlocal done
        done += count
        progress(done, total, name)

    return [
        _evaluate_one(plan, candidate, exchanges, advance=functools.partial(advance, name=candidate.name))
        for candidate in plan.candidates
    ]


def write_evaluations(config: EvaluateConfig, evaluations: Sequence[Evaluation]) -> None:
    """Into `config.output`, if there is one; several also as a plot beside it.

    Raises:
        UserError: it cannot be written.
    """
    if config.output:
        results = [asdict(evaluation) for evaluation in evaluations]
        write_text(
            Path(config.output),
            json.dumps({"config": config.model_dump(mode="json"), "results": results}, indent=2) + "\n",
        )
        if len(evaluations) > 1:
            plot_comparison(plot_file(config), results, title=f"{config.split} records of {Path(config.data).name}")


def plot_file(config: EvaluateConfig) -> Path:
    """Where a comparison's plot goes: beside `output`."""
    return Path(str(config.output)).with_suffix(".png")


def _evaluate_one(
    plan: EvaluationPlan,
    candidate: Candidate,
    exchanges: list[dict[str, list[int]]],
    *,
    advance: Callable[[int], None],
) -> Evaluation:
    import ray

    # Read once, here; workers get it from the object store, in a list, in which Ray leaves a reference as it is.
    delta = [] if candidate.delta is None else [ray.put(candidate.delta)]
    nll, tokens, num_bytes, records = _sums(plan, delta, advance=advance)
    rouge, matches, samples = _answer_scores(plan, delta, exchanges, advance=advance)
    return Evaluation(
        name=candidate.name,
        delta=candidate.folder,
        method=name_of(candidate.delta.method) if candidate.delta else None,
        trained_parameters=sum(t.numel() for t in candidate.delta.weights.values()) if candidate.delta else 0,
        records=records,
        tokens=tokens,
        loss=nll / tokens,
        perplexity=math.exp(min(nll / tokens, 700)),
        bits_per_byte=nll / math.log(2) / max(1, num_bytes),
        answers=len(exchanges),
        rouge_l=rouge / len(exchanges) if exchanges else None,
        exact_match=matches / len(exchanges) if exchanges else None,
        samples=samples,
    )


def _sums(plan: EvaluationPlan, delta: list[Any], *, advance: Callable[[int], None]) -> tuple[float, int, int, int]:
    """-log p, tokens, bytes and records, summed over the split; all that is kept of a batch."""
    import ray.data

    config = plan.config
    rows = on_all_cpus(ray.data.read_parquet(plan.manifest.files(config.split)))
    rows.context.execution_options.preserve_order = True  # so that max_records means the same ones each time
    if config.max_records:
        rows = rows.limit(config.max_records)
    scored = rows.map_batches(
        score_batch,
        batch_size=config.batch_size,
        batch_format="numpy",
        **_on_workers(config, delta),
    )
    nll, tokens, num_bytes, records = 0.0, 0, 0, 0
    for row in scored.iter_rows():
        nll, tokens = nll + row["nll"], tokens + int(row["tokens"])
        num_bytes, records = num_bytes + int(row["bytes"]), records + int(row["records"])
        advance(int(row["rows"]))
    return nll, tokens, num_bytes, records


def _answer_scores(
    plan: EvaluationPlan,
    delta: list[Any],
    exchanges: list[dict[str, list[int]]],
    *,
    advance: Callable[[int], None],
) -> tuple[float, int, list[Answer]]:
    """ROUGE-L and exact matches, summed over the answers, and the first few answers."""
    import ray.data

    if not exchanges:
        return 0.0, 0, []
    config = plan.config
    num_batches = math.ceil(len(exchanges) / config.batch_size)
    prompts = ray.data.from_items(exchanges, override_num_blocks=num_batches)
    on_all_cpus(prompts).context.execution_options.preserve_order = True
    answered = prompts.map_batches(
        _answer_batch,
        batch_size=None,
        batch_format="pyarrow",
        **_on_workers(config, delta, most=num_batches),
    )
    rouge, matches, samples = 0.0, 0, list[Answer]()
    for row in answered.iter_rows():
        rouge, matches = rouge + row["rouge_l"], matches + bool(row["is_exact"])
        if len(samples) < config.samples:
            samples.append(Answer(**row))
        advance(1)
    return rouge, matches, samples


def _on_workers(config: EvaluateConfig, delta: list[Any], *, most: int = 2**31) -> dict[str, Any]:
    """How `map_batches` runs what needs the model, in `most` tasks at a time at most."""
    import ray.data

    return {
        "fn_kwargs": {"config": config, "delta": delta},
        "compute": ray.data.TaskPoolStrategy(size=min(config.workers.count, most)),
        "num_cpus": config.workers.cpus,
        "num_gpus": config.workers.gpus,
        "runtime_env": {"env_vars": thread_environment(config.workers)},
    }


@torch.no_grad()
def score_batch(columns: dict[str, np.ndarray], *, config: EvaluateConfig, delta: list[Any]) -> dict[str, list[float]]:
    """A batch of rows to one row of sums, in a Ray Data task. Logits never leave it, nor anything a row long."""
    device, model, tokenizer = _model_on_worker(config, *delta)
    batch = collate(*(list(columns[name]) for name in COLUMNS)).to(device)
    with autocast(device, config.precision):
        nll, count = masked_nll(model, batch)
    responses = [ids[mask] for ids, mask in zip(columns["input_ids"], columns["loss_mask"], strict=True)]
    return {
        "nll": [nll.item()],
        "tokens": [count.item()],
        "bytes": [sum(len(tokenizer.decode(ids.tolist()).encode()) for ids in responses)],
        "records": [sum(map(len, columns["lengths"]))],
        "rows": [len(responses)],
    }


def _answer_batch(exchanges: pa.Table, *, config: EvaluateConfig, delta: list[Any]) -> pa.Table:
    _, model, tokenizer = _model_on_worker(config, *delta)
    answers = answer(model, tokenizer, exchanges.to_pylist(), max_tokens=config.answer_tokens)
    return pa.Table.from_pylist([asdict(each) for each in answers])


@functools.lru_cache(maxsize=1)
def _model_on_worker(config: EvaluateConfig, delta: Any = None) -> tuple[torch.device, Decoder, Tokenizer]:
    """Loaded once per worker process, which sees many batches; `delta` is a reference to a checked one."""
    import ray

    torch.set_num_threads(config.workers.threads)
    device = torch.device("cuda" if config.workers.gpus else "cpu")
    folder = model_folder(config.model)
    model = load_decoder(folder)
    if delta is not None:
        fold_delta(model, ray.get(delta))
    return device, model.to(device), load_tokenizer(folder)
