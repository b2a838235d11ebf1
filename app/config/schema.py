"""Every setting of every job: frozen, typed, unknown keys refused.

Owns names, types, defaults and the combinations that cannot work. Does not know YAML, the command line,
torch or Ray. A field's docstring is its documentation.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Precision = Literal["auto", "fp32", "bf16"]


def _absolute(path: str) -> str:
    # Ray's workers run in directories of their own, where a relative path would mean another file.
    if "://" in path:
        raise ValueError("object stores are not supported yet; name a path, on a disk that all nodes share")
    if not path:
        raise ValueError("names no path")
    return str(Path(path).expanduser().absolute())


def _absolute_folder(name: str) -> str:
    is_folder = name.startswith((".", "~")) or (name != "embedded" and Path(name).is_dir())
    return _absolute(name) if is_folder else name


def _source(name: str) -> str:
    if "://" in name:
        return name
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and not _is_data_file(name)
    return name if is_hub_name and not Path(name).exists() else _absolute(name)


def _as_tuple(value: Any) -> Any:
    """One stands for a list of one."""
    return value if isinstance(value, list | tuple) else (str(value),)


def _is_data_file(name: str) -> bool:
    return name.removesuffix(".gz").endswith((".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".md"))


LocalPath = Annotated[str, AfterValidator(_absolute)]
"""A file or folder; a relative one is taken from the directory that the configuration is read in."""
ModelName = Annotated[str, AfterValidator(_absolute_folder)]
"""`embedded`, a folder, or a Hugging Face name."""
SourceName = Annotated[str, AfterValidator(_source)]
"""A file, a glob, an object store's URI, or the name of a dataset on the Hugging Face hub."""


class Config(BaseModel):
    """Base of all settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


# --- parts shared by several jobs ---------------------------------------------------------------


class WorkersConfig(Config):
    count: Positive = 2
    """Ray Train worker processes."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs that each worker reserves on the cluster."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs that each worker reserves; above 0 the workers train on them with NCCL, else on CPU with gloo."""
    threads: Positive = 1
    """Compute threads of each worker (OMP_NUM_THREADS)."""


class OptimizerConfig(Config):
    """AdamW (in pretraining Muon beside it), with linear warm-up, then cosine decay to a tenth of the peak."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_fraction: Fraction = 0.05
    """Share of all steps over which the learning rate rises from zero."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global L2 norm."""


class DeepSpeedConfig(Config):
    zero_stage: Literal[0, 1] = 1
    """ZeRO stage: 0 replicates the optimizer state on every worker, 1 partitions it."""


class LoraConfig(Config):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    """Linear layers of each block that get an update, by the end of their name."""


class FullConfig(Config):
    """Every weight trains."""

    type: Literal["full"] = "full"


MethodConfig = Annotated[LoraConfig | FullConfig, Field(discriminator="type")]


# --- one class per job --------------------------------------------------------------------------


class PacosTemplateConfig(Config):
    """`Instruction: …`, `Input: …`, `Response: …`, a line each."""

    type: Literal["pacos"] = "pacos"


class AlpacaTemplateConfig(Config):
    """Stanford Alpaca's two prompts, with and without an input."""

    type: Literal["alpaca"] = "alpaca"


class ChatTemplateConfig(Config):
    """A Jinja chat template, as `transformers` understands it."""

    type: Literal["chat"] = "chat"
    file: LocalPath | None = None
    """File with the template; none takes the `chat_template` of the model's tokenizer."""


class RawTemplateConfig(Config):
    """Prompts and responses as they are written in the records."""

    type: Literal["raw"] = "raw"


TemplateConfig = Annotated[
    PacosTemplateConfig | AlpacaTemplateConfig | ChatTemplateConfig | RawTemplateConfig, Field(discriminator="type")
]


class PaddedLayout(Config):
    """One record a row; a batch is padded to its longest row."""

    type: Literal["padded"] = "padded"


class FixedLayout(Config):
    """One record a row; every row is padded to `length`: one shape for compilers and static graphs."""

    type: Literal["fixed"] = "fixed"
    length: Annotated[int, Field(ge=8)] = 512


class PackedLayout(Config):
    """Several records a row, with positions and attention of their own: hardly any padding."""

    type: Literal["packed"] = "packed"
    length: Annotated[int, Field(ge=8)] = 1024
    """Tokens a row."""


Layout = Annotated[PaddedLayout | FixedLayout | PackedLayout, Field(discriminator="type")]
RecordFormat = Literal["alpaca", "dolly", "prompt_completion", "chat", "text"]


class PrepareConfig(Config):
    """`pacos prepare`: instruction records to tokenized Parquet shards."""

    source: Annotated[tuple[SourceName, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    """Files, globs, `s3://` or `gs://` URIs, or names of Hugging Face datasets; one or a list. JSON, JSONL, Parquet or
    CSV, gzipped or not."""
    output: LocalPath
    """Folder to write; replaced as a whole once the new shards are complete."""
    model: ModelName = "embedded"
    """Model whose tokenizer is used: `embedded`, a folder, or a Hugging Face name."""
    format: Literal["auto", "alpaca", "dolly", "prompt_completion", "chat", "text"] = "auto"
    """How records name their parts; `auto` tells by the fields of each file's first records."""
    fields: dict[str, str] = {}
    """Other names of a format's fields, as in `fields={instruction: question, output: answer}`."""
    template: TemplateConfig = PacosTemplateConfig()
    """How a record becomes text. It travels with the shards and with every delta that is trained on them."""
    on_invalid: Literal["repair", "drop", "fail"] = "repair"
    """`repair` mends what has one obvious remedy and drops the rest, `drop` drops both, `fail` stops at the first."""
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of records that may be dropped, duplicates aside, before the job stops."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What becomes of a record that says the same as an earlier one."""
    layout: Layout = PaddedLayout()
    """How training records lie in rows. Held-out records are one a row in any layout."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Longest record in tokens."""
    truncation: Literal["prompt", "response", "drop"] = "prompt"
    """What a longer record loses: the middle of its prompt, the tail of its response, or its place."""
    validation_fraction: Fraction = 0.05
    """Share of records held out, chosen by a hash of each record's content."""
    test_fraction: Fraction = 0.0
    """Share held out besides, for a last look; a record's place does not depend on `validation_fraction`."""
    records_per_shard: Positive = 4000
    """Source records that one task reads, and one shard comes from."""
    seed: Seed = 0
    """Of the order of training rows within a shard."""

    @model_validator(mode="after")
    def _check(self) -> "PrepareConfig":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} leave nothing "
                "to train on; they must add up to less than 1"
            )
        length = getattr(self.layout, "length", self.max_length)
        if length < self.max_length:
            raise ValueError(f"layout.length={length} must be at least max_length={self.max_length}")
        return self


class InspectConfig(Config):
    """`pacos inspect`: what prepared data looks like, in the terminal and as a page."""

    data: LocalPath
    """Folder that `pacos prepare` wrote."""
    split: Literal["train", "validation", "test"] = "train"
    samples: Annotated[int, Field(ge=0)] = 3
    """Records to show, drawn by `seed`."""
    seed: Seed = 0
    report: LocalPath | None = None
    """HTML file to write; none writes `report.html` into the folder."""


class PretrainConfig(Config):
    """`pacos pretrain`: a byte-level BPE tokenizer and a GPT-2-shaped model from scratch."""

    sources: Annotated[tuple[LocalPath, ...], Field(min_length=1)]
    """Files to learn from: instruction records (.json, .jsonl) or plain text (.txt, .md)."""
    output: LocalPath
    vocab_size: Annotated[int, Field(ge=260)] = 8192
    context_length: Annotated[int, Field(ge=8)] = 512
    num_layers: Positive = 6
    num_heads: Positive = 5
    width: Positive = 320
    batch_size: Positive = 16
    """Sequences of `context_length` tokens per optimizer step, over all workers."""
    steps: Positive = 2000
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
    precision: Precision = "auto"
    validation_fraction: Fraction = 0.05
    eval_every: Positive = 200
    """Steps between evaluations on held-out text; a checkpoint follows each."""
    workers: WorkersConfig = WorkersConfig(count=1, cpus=2, threads=2)
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> "PretrainConfig":
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")
        _check_batch(self.batch_size, self.workers)
        return self


class TrainConfig(Config):
    """`pacos train`: fine-tune a model on prepared shards."""

    data: LocalPath
    """Folder that `pacos prepare` wrote."""
    output: LocalPath
    """Folder for the run: checkpoints, metrics, plot, and the result in `delta/` (or `model/` for full tuning)."""
    model: ModelName = "embedded"
    method: MethodConfig = LoraConfig()
    batch_size: Positive = 16
    """Records per optimizer step, over all workers."""
    epochs: Positive = 1
    max_steps: Positive | None = None
    """Stop after this many steps, if the epochs hold as many."""
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = "auto"
    """bf16 computes under autocast, auto does so where the hardware has it; trained weights stay fp32 in any."""
    eval_every: Positive = 100
    """Steps between evaluations on held-out records."""
    save_every: Positive = 100
    """Steps between checkpoints; what a crash costs at most."""
    keep_checkpoints: Positive = 2
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often lost workers are replaced, each time from the last checkpoint."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    workers: WorkersConfig = WorkersConfig()
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        _check_batch(self.batch_size, self.workers)
        return self


class EvaluateConfig(Config):
    """`pacos evaluate`: loss and perplexity on held-out records, and a few generated answers."""

    data: LocalPath
    model: ModelName = "embedded"
    delta: LocalPath | None = None
    """Folder of a trained delta to apply to the model; none evaluates the model alone."""
    split: Literal["validation", "test", "train"] = "validation"
    max_records: Positive | None = None
    batch_size: Positive = 16
    precision: Precision = "fp32"
    workers: WorkersConfig = WorkersConfig()
    samples: Annotated[int, Field(ge=0)] = 3
    """Held-out prompts to answer greedily and print beside the reference."""
    output: LocalPath | None = None
    """JSON file to write the figures to."""


class IndexConfig(Config):
    """`pacos index`: a folder of documents to a searchable index."""

    documents: LocalPath
    """Folder (searched recursively for .md and .txt) or one file."""
    output: LocalPath
    embedder: ModelName = "embedded"
    """`embedded`, a sentence-transformers folder, or a Hugging Face name."""
    chunk_words: Annotated[int, Field(ge=10)] = 90
    overlap_words: Annotated[int, Field(ge=0)] = 20
    batch_size: Positive = 64
    workers: WorkersConfig = WorkersConfig(count=1)

    @model_validator(mode="after")
    def _check(self) -> "IndexConfig":
        if self.overlap_words >= self.chunk_words:
            raise ValueError(f"overlap_words={self.overlap_words} must be less than chunk_words={self.chunk_words}")
        return self


class GeneratorConfig(Config):
    model: str = "embedded"
    deltas: dict[str, str] = {}
    """Fine-tuned variants by name: a request for model `pacos:NAME` is answered with the delta in that folder."""
    precision: Literal["fp32", "bf16"] = "fp32"
    max_batch_size: Positive = 16
    """Sequences that are generated together; each reserves KV cache for a whole context."""
    max_queue: Positive = 128
    """Requests that may wait; the next one is refused with 429."""
    threads: Positive = 2
    device: Literal["cpu", "cuda"] = "cpu"


class RetrieverConfig(Config):
    index: str | None = None
    """Folder that `pacos index` wrote; none turns /v1/rag off."""
    top_k: Positive = 3
    """Passages put before the model, if the request does not say."""


class MemoryCacheConfig(Config):
    type: Literal["memory"] = "memory"
    max_entries: Positive = 10_000


class RedisCacheConfig(Config):
    type: Literal["redis"] = "redis"
    url: str
    """redis://host:port/db"""
    timeout_s: Annotated[float, Field(gt=0)] = 0.2
    """A lookup that takes longer counts as a miss."""


class CacheConfig(Config):
    backend: Annotated[MemoryCacheConfig | RedisCacheConfig, Field(discriminator="type")] = MemoryCacheConfig()
    ttl_s: Annotated[float, Field(gt=0)] = 3600


class ApplicationConfig(Config):
    """The typed `args` of `serve_config.yaml`."""

    name: str = "pacos"
    """The base model's name in the API; deltas are `NAME:DELTA`."""
    generator: GeneratorConfig = GeneratorConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    cache: CacheConfig = CacheConfig()
    request_timeout_s: Annotated[float, Field(gt=0)] = 120
    max_body_bytes: Positive = 1_000_000


class ServeConfig(ApplicationConfig):
    """`pacos serve`: the application, and where it listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000


class AskConfig(Config):
    """`pacos ask`: one question to a running endpoint."""

    question: str
    url: str = "http://127.0.0.1:8000"
    model: str = "pacos"
    rag: bool = False
    """Retrieve passages first and print the sources."""
    max_tokens: Positive = 128
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    timeout_s: Annotated[float, Field(gt=0)] = 120


class QuickstartConfig(Config):
    """`pacos quickstart`: prepare, train, evaluate, index, serve and ask, on what the project carries."""

    instructions: str = "examples/instructions.jsonl"
    documents: str = "examples/documents"
    output: str = "runs/quickstart"
    """Replaced at each start."""
    train: str = "configs/quickstart.yaml"
    """Training settings; `data` and `output` follow from `output` above."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    delta_name: str = "quickstart"
    """The tuned model is served as `pacos:NAME`."""
    plain_question: str = "Explain in one sentence why the sea is salty."
    rag_question: str = "How long does the pregnancy of an alpaca last?"


def _check_batch(batch_size: int, workers: WorkersConfig) -> None:
    if batch_size % workers.count:
        raise ValueError(f"batch_size={batch_size} must be a multiple of workers.count={workers.count}")
