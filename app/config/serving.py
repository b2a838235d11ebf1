"""Settings of serving: the application, `pacos serve`, `pacos ask`, keys. A field's docstring is its documentation."""

from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator

from app.config.base import Config, LocalPath, Masked, Positive, SearchMode, VectorKind
from app.config.documents import ChunkingConfig, ReadingConfig
from app.config.tracking import StoreConfig

Port = Annotated[int, Field(ge=1, le=65535)]


class GeneratorConfig(Config):
    model: str = "embedded"
    deltas: dict[str, str] = {}
    """Fine-tuned variants by name: a request for model `pacos:NAME` is answered with the delta in that folder, or with
    that of the model registry: `models:/NAME@production`, `models:/NAME/3`."""
    load_registered: bool = False
    """Whether a request for `pacos:NAME` that `deltas` lacks loads `models:/NAME@production`, when it first comes."""
    refresh_s: Annotated[float, Field(gt=0)] = 5.0
    """How often the registry is asked whether an alias has moved."""
    tracking: StoreConfig = StoreConfig()
    """Of the model registry."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model's weights and products; auto: bf16 where the processor or GPU multiplies it, fp32 elsewhere."""
    max_batch_size: Positive = 64
    """Answers that are generated together."""
    max_queue: Positive = 512
    """Answers that may wait; the next request is refused with 429."""
    max_kv_bytes: Positive | None = None
    """Of the KV cache; none: room for `max_batch_size` whole contexts."""
    prefault_kv: bool = False
    """On a CPU: take the cache's memory at the start, not as it is first used: the first requests then do not wait for
    it."""
    kv_dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Of the KV cache; auto: the model's own. int8, on a CPU: half of bf16's memory, keys and values rounded."""
    max_delta_bytes: Positive = 2**30
    """Of the deltas in the base's engine; those that `deltas` does not name are unloaded beyond it, the least recently
    used first."""
    max_extra_blocks: Annotated[int, Field(ge=0)] = 1
    """As many as a delta in the base's engine may add to it; the KV cache has room for their keys and values."""
    threads: Positive = 2
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _is_on_a_cpu_in_int8(self) -> Self:
        if self.kv_dtype == "int8" and self.device != "cpu":
            raise ValueError("kv_dtype: int8 is for a CPU; with device: cuda take bf16")
        return self


class UploadsConfig(ChunkingConfig):
    max_bytes: Positive = 20_000_000
    """Of a request to /v1/documents."""
    max_files: Positive = 50
    """Of a request."""
    resource: str | None = None
    """Of Ray, that the machine with the folder has and no other (`node:10.0.0.7`): keeps the deployment there."""
    reading: ReadingConfig = ReadingConfig()


class RetrieverConfig(Config):
    index: str | None = None
    """Folder that `pacos index` wrote; without it and `documents`, /v1/rag is off."""
    documents: str | None = None
    """Folder for documents that are uploaded to /v1/documents, on a disk of the machine that the deployment `documents`
    runs on; none turns that off. While it is new, the documents of `index` are taken in."""
    uploads: UploadsConfig = UploadsConfig()
    embedder: str | None = None
    """Of uploads and /v1/embeddings: `embedded`, a sentence-transformers folder, or a Hugging Face name; none: the
    index's, without an index the embedded one. An index is searched with the embedder that made it."""
    vectors: VectorKind = "auto"
    """Of uploads, as in `pacos index`."""
    threads: Positive = 2
    """For building a graph (hnsw) or lists (ivf_pq) over uploads."""
    search: SearchMode = "hybrid"
    """By meaning (`dense`), by words (BM25), or by both, if the request does not say."""
    top_k: Positive = 3
    """Passages put before the model, if the request does not say."""
    reranker: str | None = None
    """A cross-encoder, by folder or Hugging Face name, that puts what was found into a better order; none: as found."""
    rerank: Positive = 30
    """Passages that it reads for a question: each costs a pass through the model."""


class MemoryCacheConfig(Config):
    type: Literal["memory"] = "memory"
    max_bytes: Positive = 2**28
    """Of each replica's entries; the least recently used go first."""


class RedisCacheConfig(Config):
    type: Literal["redis"] = "redis"
    url: Annotated[str, Masked]
    """redis://host:port/db, or rediss:// for TLS. Its password is PACOS_REDIS_PASSWORD, so that no file has it."""
    timeout_s: Annotated[float, Field(gt=0)] = 0.2
    """A lookup that takes longer counts as a miss."""


class CacheConfig(Config):
    backend: Annotated[MemoryCacheConfig | RedisCacheConfig, Field(discriminator="type")] = MemoryCacheConfig()
    ttl_s: Annotated[float, Field(gt=0)] = 3600
    sampled: bool = False
    """Whether answers that were drawn at random, without a seed, are kept too: who asks again gets the same one."""
    semantic: bool = False
    """Whether an answer also goes to who asks the same in other words."""
    similarity: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """How alike the embedded embedder must find the two questions, beside what the words themselves must have in
    common."""


class KeyHolder(Config):
    """Whose a key is, and how much may be asked with it."""

    name: Annotated[str, Field(pattern=r"^[\w.@-]{1,100}$")]
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    """Prompt and answer tokens that are computed; an answer from the cache costs none."""


class ApiKeyConfig(KeyHolder):
    """One entry of a file of keys."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the key, which itself is kept nowhere."""


class AccessConfig(Config):
    """Who may ask, and how much. Without any key everyone may."""

    keys_file: str | None = None
    """YAML, a list of what `keys` holds, as `pacos key NAME` writes it; read again when it changes."""
    keys: tuple[ApiKeyConfig, ...] = ()
    """Beside those of the file and of PACOS_API_KEYS (`NAME:SHA256,NAME:SHA256`)."""


class LogConfig(Config):
    """The replicas' logs, with a line for each request."""

    format: Literal["text", "json"] = "text"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """WARNING leaves out the lines of requests."""


class TracingConfig(Config):
    """OpenTelemetry's spans of each request, by OTLP to where OTEL_EXPORTER_OTLP_ENDPOINT says; needs
    `pacos[tracing]`."""

    enabled: bool = False
    sampling_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the requests; one that brings a `traceparent` is traced if that says so."""


class ApplicationConfig(Config):
    """The typed `args` of `serve_config.yaml`."""

    name: str = "pacos"
    """The base model's name in the API; deltas are `NAME:DELTA`."""
    generator: GeneratorConfig = GeneratorConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    cache: CacheConfig = CacheConfig()
    access: AccessConfig = AccessConfig()
    log: LogConfig = LogConfig()
    request_timeout_s: Annotated[float, Field(gt=0)] = 120
    drain_timeout_s: Annotated[float, Field(gt=0)] | None = None
    """How long a replica that is to go may finish what it has accepted; none: `request_timeout_s`, as long as that
    can take."""
    max_body_bytes: Positive = 1_000_000

    @property
    def drain_s(self) -> float:
        return self.drain_timeout_s or self.request_timeout_s


class TlsConfig(Config):
    """HTTPS in place of HTTP."""

    certificate: LocalPath
    """PEM: the server's, then those between it and the root."""
    key: LocalPath
    """PEM: the certificate's, without a password."""


class ServeConfig(ApplicationConfig):
    """`pacos serve`: the application, and where it listens."""

    host: str = "127.0.0.1"
    port: Port = 8000
    tls: TlsConfig | None = None
    """None speaks HTTP."""
    proxy: Literal["serve", "haproxy"] = "serve"
    """What requests come to first: Serve's own proxy, in Python; or HAProxy, which sends them straight to the ingress,
    for a fraction of the work (docs/serving.md says what else differs)."""
    tracing: TracingConfig = TracingConfig()


class AskConfig(Config):
    """`pacos ask`: one question to a running endpoint."""

    question: str
    url: str = "http://127.0.0.1:8000"
    model: str = "pacos"
    rag: bool = False
    """Retrieve passages first and print the sources."""
    api_key: SecretStr | None = None
    """If the endpoint asks for one; unset, PACOS_API_KEY."""
    ca_file: LocalPath | None = None
    """PEM: whom to believe an https:// endpoint's certificate; none: the public authorities."""
    max_tokens: Positive = 128
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    timeout_s: Annotated[float, Field(gt=0)] = 120


class KeyConfig(KeyHolder):
    """`pacos key NAME`: a new key for an endpoint."""

    keys_file: LocalPath
    """The entry is added to it; it is made if need be."""
