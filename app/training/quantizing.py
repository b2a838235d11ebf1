"""`pacos quantize`: a model folder to a smaller one, both measured, each in a process of its own.

Needs no Ray: it is one pass over one model. Quantized folders load wherever a model is named; a LoRA trained over one
is QLoRA.
"""

import concurrent.futures
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from app.assets import model_folder
from app.atomic import check_apart, check_replaceable, replaced_folder, told_if_full
from app.config.transfer import QuantizeConfig
from app.data.batches import Batch, batches_by_length
from app.data.shards import COLUMNS, Manifest, read_manifest
from app.data.tokenization import TOKENIZER_FILES, copy_tokenizer
from app.engine.engine import Engine
from app.engine.sampling import Sampling
from app.errors import UserError
from app.models.checkpoints import (
    MODEL_FILES,
    PROVENANCE_FILE,
    load_decoder,
    read_provenance,
    save_decoder,
    stored_dtype,
    weight_bytes,
    weights_hash,
    write_provenance,
)
from app.models.decoder import Decoder
from app.models.quantization import QuantizationConfig, Sizes, quantize, quantized_bytes
from app.training.compatibility import check_fits
from app.training.loop import evaluate
from app.training.trainer import peak_memory_bytes

BATCH_SIZE = 16
PROMPT_LENGTH = 128
NEW_TOKENS = 32
_CONTENTS = (*MODEL_FILES, *TOKENIZER_FILES, PROVENANCE_FILE)


@dataclass(frozen=True)
class Figures:
    """One model's, measured after loading it in a fresh process."""

    file_bytes: int
    peak_bytes: int
    """Of the whole process, Python and torch included, while it loads and generates."""
    first_token_s: float
    """From a prompt of `PROMPT_LENGTH` tokens to the first token, alone."""
    token_s: float
    """Each token after that, alone."""
    tokens_per_s: float
    """Generated, with `BATCH_SIZE` prompts together."""
    perplexity: float | None


@dataclass(frozen=True)
class Quantized:
    output: str
    layers: Sizes
    """Bytes of the layers that were quantized."""
    before: Figures
    after: Figures


def run(config: QuantizeConfig, *, progress: Callable[[str], None] = lambda stage: None) -> Quantized:
    """Quantize, write the folder in one rename, measure both.

    Raises:
        UserError: model and data do not fit together, or the model is quantized already.
    """
    source, output = model_folder(config.model), Path(config.output)
    check_apart(output, source)
    check_replaceable(output, _CONTENTS)
    manifest = read_manifest(config.data) if config.data else None
    if manifest is not None:
        check_fits(manifest, data=str(config.data), model=config.model)
        if not manifest.num_rows("validation"):
            raise UserError(f"data={config.data!r} has no held-out records; prepare it with validation_fraction > 0")
    progress("quantizing")
    layers = _write_quantized(source, output, config, manifest)
    progress("measuring full precision")
    before = _in_own_process(source, config)
    progress(f"measuring {config.scheme}")
    return Quantized(str(output), layers, before, _in_own_process(output, config))


def _write_quantized(source: Path, output: Path, config: QuantizeConfig, manifest: Manifest | None) -> Sizes:
    torch.set_num_threads(config.threads)
    model = load_decoder(source)
    quantization = QuantizationConfig(scheme=config.scheme, targets=config.targets)
    calibration = None
    if config.scheme == "int8_static":
        assert manifest is not None
        calibration = _calibration_ids(manifest, config.calibration_records)
    quantize(model, quantization, calibration=calibration)
    with told_if_full(output), replaced_folder(output, contents=_CONTENTS) as staging:
        save_decoder(staging, model, dtype=stored_dtype(source), quantization=quantization)
        copy_tokenizer(source, staging)
        origin = {"quantized_from": config.model, "quantized_hash": weights_hash(source)}
        write_provenance(staging, {**read_provenance(source), **origin})
    return quantized_bytes(model)


def _calibration_ids(manifest: Manifest, count: int) -> Iterator[Tensor]:
    """Training rows one by one, without padding, whose activations would count too."""
    for ids in manifest.read("train")["input_ids"].to_numpy()[:count]:
        yield torch.as_tensor(ids).long().unsqueeze(0)


def _in_own_process(folder: Path, config: QuantizeConfig) -> Figures:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, folder, config).result()


def measure(folder: Path, config: QuantizeConfig) -> Figures:
    """Load the model in `folder` and measure it."""
    torch.set_num_threads(config.threads)
    model = load_decoder(folder).requires_grad_(False)
    first_token_s, token_s = _latency(model)
    tokens_per_s = _throughput(model)
    peak_bytes = peak_memory_bytes()
    perplexity = None
    if config.data:
        perplexity = math.exp(evaluate(model, _held_out(config), precision="fp32")["eval_loss"])
    return Figures(weight_bytes(folder), peak_bytes, first_token_s, token_s, tokens_per_s, perplexity)


def _held_out(config: QuantizeConfig) -> Iterator[Batch]:
    table = read_manifest(str(config.data)).read("validation")
    columns = (table[name].to_numpy()[: config.max_records] for name in COLUMNS)
    return batches_by_length(zip(*columns, strict=True), size=BATCH_SIZE)


def _latency(model: Decoder) -> tuple[float, float]:
    """Seconds to the first token, and for each one more: the fastest of three, after one to warm up."""
    tries = [_generate(model, num_prompts=1) for _ in range(4)][1:]
    return min(first for first, _ in tries), min(later for _, later in tries)


def _throughput(model: Decoder) -> float:
    num_tokens = min(NEW_TOKENS, model.max_length // 2)
    first_s, token_s = _generate(model, num_prompts=BATCH_SIZE)
    return BATCH_SIZE * num_tokens / (first_s + token_s * (num_tokens - 1))


def _generate(model: Decoder, *, num_prompts: int) -> tuple[float, float]:
    """Seconds of the step that computes the prompts, and the mean of those that follow."""
    num_tokens = min(NEW_TOKENS, model.max_length // 2)
    prompt_length = min(PROMPT_LENGTH, model.max_length - num_tokens)
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (num_prompts, prompt_length), generator=draw).tolist()
    engine = Engine(model, max_batch_size=num_prompts, max_queue=num_prompts)
    for prompt in prompts:
        engine.add_request(prompt, Sampling(max_tokens=num_tokens))
    times = []
    while engine.has_work:
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return times[0], sum(times[1:]) / max(1, len(times) - 1)
