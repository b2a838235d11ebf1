"""Every setting of every job but those on data: frozen, typed, unknown keys refused.

Owns names, types, defaults and the combinations that cannot work. Does not know YAML, the command line,
torch or Ray. A field's docstring is its documentation.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from app.config.base import (
    AttentionBackend,
    Config,
    Fraction,
    LocalPath,
    ModelName,
    Positive,
    Precision,
    Seed,
    StorageName,
    VectorKind,
)
from app.config.documents import ChunkingConfig, ReadingConfig
from app.config.methods import LoraConfig, MethodConfig
from app.config.tracking import RegisteredName, StoreConfig, TrackingConfig

# --- parts shared by several jobs ---------------------------------------------------------------


def _fixed_count(count: object) -> object:
    if isinstance(count, list | tuple):
        raise ValueError("this job takes one number of workers; a pair [least, most] is for `pacos train`")
    return count


def _count_or_range(count: object) -> object:
    numbers = count if isinstance(count, list | tuple) else [count]
    is_whole = all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers)
    if not is_whole or len(numbers) not in (1, 2) or list(numbers) != sorted(numbers):
        raise ValueError("give a number of workers from 1, or a pair [least, most]")
    return tuple(numbers) if len(numbers) == 2 else numbers[0]


class WorkerResources(Config):
    """What each worker of a job takes."""

    cpus: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs that each worker reserves on the cluster."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs that each worker reserves; above 0 the workers train on them with NCCL, else on CPU with gloo."""
    threads: Positive = 1
    """Compute threads of each worker (OMP_NUM_THREADS)."""


class PricedWorkers(Config):
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Of one worker, in any currency; the run then says what it cost."""


class WorkersConfig(WorkerResources):
    count: Annotated[int, BeforeValidator(_fixed_count), Field(gt=0)] = 2
    """Worker processes."""

    @property
    def least(self) -> int:
        return self.count

    @property
    def most(self) -> int:
        return self.count


class TrainingWorkersConfig(WorkersConfig, PricedWorkers):
    """Of training with a fixed number of workers."""


class ElasticWorkersConfig(WorkerResources, PricedWorkers):
    """Of jobs that go on with however many workers the cluster holds."""

    count: Annotated[int | tuple[int, int], BeforeValidator(_count_or_range)] = 2
    """Ray Train worker processes; `[1, 4]` takes as many as there is room for, and follows the cluster."""

    @property
    def is_elastic(self) -> bool:
        return self.least < self.most

    @property
    def least(self) -> int:
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        return self.count if isinstance(self.count, int) else self.count[1]

    @property
    def fixed(self) -> WorkersConfig:
        """For another job beside this one: the least, for which there is room."""
        return WorkersConfig(count=self.least, cpus=self.cpus, gpus=self.gpus, threads=self.threads)


AnyWorkersConfig = WorkersConfig | ElasticWorkersConfig


class OptimizerConfig(Config):
    """AdamW (in pretraining Muon beside it)."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """The peak, after the warm-up."""
    schedule: Literal["cosine", "linear", "constant", "trapezoid"] = "cosine"
    """How the learning rate goes on from its peak; trapezoid stays there, then falls in a line at the end."""
    decay_fraction: Fraction = 0.2
    """Share of all steps over which trapezoid falls."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the peak at which every schedule but constant ends."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_fraction: Fraction = 0.05
    """Share of all steps over which the learning rate rises from zero, in a line."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global L2 norm."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if self.schedule == "trapezoid" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} come to more "
                "than all steps; lower one"
            )
        return self


class _Changed(Config):
    """Settings that are others from some step on; one that is none stays as it was."""

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    @model_serializer
    def _only_what_changes(self) -> dict[str, Any]:
        return self.given


class ChangedOptimizerConfig(_Changed):
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """The peak; the schedule goes on as before, now as shares of this one."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None


class ChangeConfig(_Changed):
    """What of a run changes on its way."""

    after: Positive
    """So many steps are made before."""
    optimizer: ChangedOptimizerConfig | None = None
    label_smoothing: Fraction | None = None


class DeepSpeedConfig(Config):
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 0 replicates everything on every worker, 1 partitions the optimizer state, 2 the gradients too, 3 the
    weights too."""


# --- one class per job --------------------------------------------------------------------------


class PretrainConfig(Config):
    """`pacos pretrain`: a byte-level BPE tokenizer and a GPT-2-shaped model from scratch, or further from a model."""

    sources: Annotated[tuple[LocalPath, ...], Field(min_length=1)]
    """Files to learn from: instruction records (.json, .jsonl) or plain text (.txt, .md)."""
    output: LocalPath
    initial_model: ModelName | None = None
    """Go on from this model's weights and tokenizer, whose shape then counts; none starts from scratch."""
    vocab_size: Annotated[int, Field(ge=260)] = 8192
    context_length: Annotated[int, Field(ge=8)] = 512
    num_layers: Positive = 6
    num_heads: Positive = 5
    width: Positive = 320
    mlp_width: Positive | None = None
    """Of the feed-forward layers; none means four times the width, for swiglu with its third matrix 8/3 times."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    positions: Literal["learned", "rotary"] = "learned"
    activation: Literal["gelu", "swiglu", "clamped_relu"] = "gelu"
    """With the defaults of these the result is a GPT-2, which `transformers` opens too."""
    num_kv_heads: Positive | None = None
    """Heads of keys and values, each shared by several of queries; none gives each its own."""
    attention: AttentionBackend = "auto"
    """As in training."""
    batch_size: Positive = 16
    """Sequences of `context_length` tokens per optimizer step, over all workers."""
    steps: Positive = 2000
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
    precision: Precision = "auto"
    validation_fraction: Fraction = 0.05
    eval_every: Positive = 200
    """Steps between evaluations on held-out text; a checkpoint follows each."""
    workers: TrainingWorkersConfig = TrainingWorkersConfig(count=1, cpus=2, threads=2)
    tracking: TrackingConfig = TrackingConfig()
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> "PretrainConfig":
        if self.initial_model is None:  # else the shape is that model's
            self._check_shape()
        _check_batch(self.batch_size, self.workers)
        return self

    def _check_shape(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")
        if self.num_heads % (self.num_kv_heads or 1):
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.positions == "rotary" and self.width // self.num_heads % 2:
            raise ValueError(f"rotary positions need heads of an even width, not {self.width}/{self.num_heads}")


class TrainConfig(Config):
    """`pacos train`: fine-tune a model on prepared shards."""

    data: LocalPath
    """Folder that `pacos prepare` wrote."""
    output: LocalPath
    """Folder for the run: checkpoints, metrics, plot, and the result in `delta/` (or `model/` for full tuning)."""
    model: ModelName = "embedded"
    method: MethodConfig = LoraConfig()
    batch_size: Positive = 16
    """Rows of the shards per optimizer step, over all workers."""
    micro_batch_size: Positive | None = None
    """Rows that a worker computes at once, its gradients adding up; none computes its whole share at once."""
    epochs: Positive = 1
    max_steps: Positive | None = None
    """Stop after this many steps, if the epochs hold as many."""
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = "auto"
    """bf16 and fp16 compute under autocast, fp16 with a scaled loss; auto takes bf16 where the hardware has it. Trained
    weights stay fp32 in any."""
    attention: AttentionBackend = "auto"
    """Kernel that computes attention; auto is ours on a CPU, else what torch finds fastest, and the run says which."""
    label_smoothing: Fraction = 0.0
    """Share of each label that is spread over the whole vocabulary. Held-out losses are without."""
    changes: tuple[ChangeConfig, ...] = ()
    """Settings that are others from some step on, as a population's exchanges found them: `[{after: 50, optimizer:
    {learning_rate: 2.0e-3}}]`."""
    gradient_checkpointing: bool = False
    """Keep each block's input alone for the backward pass and compute the rest again: less memory, a third slower."""
    compile: bool = False
    """torch.compile the blocks: a minute at the start, which a long run on a GPU wins back. Needs a C++ compiler, on
    GPUs Triton."""
    eval_every: Positive = 100
    """Steps between evaluations on held-out records."""
    save_every: Positive = 100
    """Steps between checkpoints; what a crash costs at most."""
    checkpoints: StorageName | None = None
    """Folder or URI for checkpoints (s3://, gs://, hdfs://, whatever pyarrow reaches); none keeps them in `output`."""
    keep_last: Positive = 2
    """How many of the newest checkpoints are kept."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """How many are kept for their held-out loss, of those whose step `eval_every` has evaluated."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often lost workers are replaced, each time from the last checkpoint."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Held-out prompts that are answered greedily before training and after it, for the report."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    workers: ElasticWorkersConfig = ElasticWorkersConfig()
    tracking: TrackingConfig = TrackingConfig()
    register_as: RegisteredName | None = None
    """Name in MLflow's model registry under which the finished run's delta becomes the next version."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.compile and self.deepspeed.zero_stage == 3:
            raise ValueError("compile=true reads whole weights, which deepspeed.zero_stage=3 partitions; use 2")
        if self.register_as is not None and self.tracking.uri == "none":
            raise ValueError(f"register_as={self.register_as!r} needs an MLflow, and tracking.uri='none' has none")
        if self.register_as is not None and self.method.type == "full":
            raise ValueError(f"register_as={self.register_as!r}: method.type='full' leaves no delta to register")
        places = [change.after for change in self.changes]
        if places != sorted(set(places)):
            raise ValueError(f"changes: after={places} must rise from one change to the next")
        _check_batch(self.batch_size, self.workers)
        return self


class EvaluateConfig(Config):
    """`pacos evaluate`: a model or its deltas on held-out records: loss, perplexity, and answers beside references."""

    data: LocalPath
    model: ModelName = "embedded"
    delta: LocalPath | None = None
    """Folder of a trained delta to apply to the model; none evaluates the model alone."""
    deltas: tuple[LocalPath, ...] = ()
    """Folders of deltas to compare with each other and with the model alone: a table, and with `output` a plot."""
    split: Literal["validation", "test", "train"] = "validation"
    max_records: Positive | None = None
    batch_size: Positive = 16
    precision: Precision = "fp32"
    workers: WorkersConfig = WorkersConfig()
    answers: Annotated[int, Field(ge=0)] = 50
    """The split's first prompts, answered greedily and compared with their references: ROUGE-L, exact match."""
    answer_tokens: Positive = 128
    """Tokens of an answer at most."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Of these answers, how many are shown beside their references."""
    output: LocalPath | None = None
    """JSON file to write the figures to; a comparison's plot goes beside it, as PNG."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if self.delta and self.deltas:
            raise ValueError("delta and deltas are both given; name all of them in deltas")
        twice = [delta for delta in self.deltas if self.deltas.count(delta) > 1]
        if twice:
            raise ValueError(f"deltas names {twice[0]!r} twice")
        if self.output and not self.output.endswith(".json"):
            raise ValueError(f"output={self.output!r} must end in .json")
        return self


class IndexConfig(ChunkingConfig):
    """`pacos index`: a folder of documents to a searchable index."""

    documents: LocalPath
    """Folder (searched recursively for .md, .txt, .html and .pdf) or one file."""
    output: LocalPath
    embedder: ModelName = "embedded"
    """`embedded`, a sentence-transformers folder, or a Hugging Face name."""
    vectors: VectorKind = "auto"
    """How they are searched: `flat` one by one and exactly, `hnsw` along a graph, `ivf_pq` compressed in lists; auto
    takes the first up to 50,000, the second up to 2,000,000."""
    reading: ReadingConfig = ReadingConfig()
    batch_size: Positive = 64
    workers: WorkersConfig = WorkersConfig(count=1)


class GenerateConfig(Config):
    """`pacos generate`: answers to all prompts of a file."""

    prompts: LocalPath
    """.jsonl or .json of records with `instruction` (and `input`), or `prompt`, `question` or `text`; or .txt, each
    line a prompt. Half a surrogate pair is replaced, as in training data."""
    output: LocalPath
    """.jsonl: each record, with `answer`, `finish_reason`, `prompt_tokens` and `answer_tokens`, or with `error`."""
    model: ModelName = "embedded"
    delta: str | None = None
    """Folder of a trained delta, or `models:/NAME@production` of the registry."""
    tracking: StoreConfig = StoreConfig()
    """Of the model registry."""
    field: str | None = None
    """The records' field that holds the prompt, where it is none of the above."""
    raw: bool = False
    """Give prompts to the model as they are, without the template that it was tuned with."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model's weights and products; auto: bf16 where the processor or GPU multiplies it, fp32 elsewhere."""
    max_tokens: Positive = 128
    """Of each answer."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Positive | None = None
    seed: int = 0
    """Of the first prompt's answer; each next one's is one more, wherever it is computed."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not in it."""
    max_batch_size: Positive = 64
    """Answers that a worker generates together."""
    part_size: Positive = 256
    """Prompts that are written together: a job that is stopped loses the parts that it was in."""
    workers: WorkersConfig = WorkersConfig(count=1, cpus=2, threads=2)

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        if not self.output.endswith(".jsonl"):
            raise ValueError(f"output={self.output!r} must end in .jsonl")
        if not self.prompts.endswith((".jsonl", ".json", ".txt")):
            raise ValueError(f"prompts={self.prompts!r} must end in .jsonl, .json or .txt")
        if self.prompts == self.output:
            raise ValueError(f"output={self.output!r} is the file of prompts; name another")
        return self


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


def _check_batch(batch_size: int, workers: AnyWorkersConfig) -> None:
    if batch_size < workers.most:
        raise ValueError(f"batch_size={batch_size} leaves some of workers.count={workers.most} without a row")
