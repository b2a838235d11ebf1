"""The Serve application: deployments bound to each other. `serve deploy` and `pacos serve` both call `build`."""

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from app.config import ApplicationConfig, validate
from app.errors import UserError
from app.ray_cluster import BESIDE_OTHERS
from app.serving.access import KeyRing, keys_of_environment
from app.serving.documents import DocumentsDeployment
from app.serving.generator import GeneratorDeployment
from app.serving.ingress import IngressDeployment
from app.serving.limiter import LimiterDeployment
from app.serving.registered_deltas import with_registry
from app.serving.retriever import RetrieverDeployment
from app.tracking.registry import is_reference

# Serve's default of 5 requests at once would leave the batching engine with nothing to batch.
_MAX_ONGOING = 1000


def build(args: dict[str, Any]) -> Application:
    """The application that `args` describe; see `ApplicationConfig`.

    Logical CPUs only place replicas: they are kept small, so that everything fits on two cores beside a small job.
    Threads are set by `generator.threads`.

    Raises:
        UserError: an unknown key, a wrong value, a relative path, or a delta that is not registered.
    """
    config = validate(ApplicationConfig, args)
    _check_absolute(config)
    config = config.model_copy(update={"generator": with_registry(config.generator)})
    # The engine's own queue refuses first, with a reason; Serve's limit is for what never reaches it.
    capacity = (1 + len(config.generator.deltas)) * (config.generator.max_batch_size + config.generator.max_queue)
    gpus = 1 if config.generator.device == "cuda" else 0
    logs = LoggingConfig(encoding=config.log.format.upper(), log_level=config.log.level)
    generator = serve.deployment(
        name="generator",
        ray_actor_options={"num_cpus": 0.5, "num_gpus": gpus, "runtime_env": {"env_vars": BESIDE_OTHERS}},
        max_ongoing_requests=capacity + 32,
        max_queued_requests=capacity,
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=config.drain_s,
        logging_config=logs,
    )(GeneratorDeployment).bind(config)
    documents = _documents(config, logs)
    retriever = serve.deployment(
        name="retriever",
        ray_actor_options={"num_cpus": 0.2},
        max_ongoing_requests=64,
        max_queued_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=config.drain_s,
        logging_config=logs,
    )(RetrieverDeployment).bind(config.retriever, documents)
    limiter = None
    access = config.access.model_copy(update={"keys": (*config.access.keys, *keys_of_environment())})
    config = config.model_copy(update={"access": access})
    if access.keys or access.keys_file is not None:
        KeyRing(access)  # a file that cannot be read is told now
        limiter = serve.deployment(
            name="limiter",
            num_replicas=1,  # it counts for all
            ray_actor_options={"num_cpus": 0.1},
            max_ongoing_requests=_MAX_ONGOING,
            max_queued_requests=_MAX_ONGOING,
            logging_config=logs,
        )(LimiterDeployment).bind()
    return serve.deployment(
        name="ingress",
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=_MAX_ONGOING,
        max_queued_requests=_MAX_ONGOING,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=config.drain_s,
        logging_config=logs.model_copy(update={"enable_access_log": False}),  # `request_log` tells more
    )(IngressDeployment).bind(config, generator, retriever, documents, limiter)


def _documents(config: ApplicationConfig, logs: LoggingConfig) -> Application | None:
    if config.retriever.documents is None:
        return None
    resource = config.retriever.uploads.resource
    return serve.deployment(
        name="documents",
        num_replicas=1,  # one writer
        ray_actor_options={"num_cpus": 0.1, "resources": {} if resource is None else {resource: 0.001}},
        max_ongoing_requests=_MAX_ONGOING,
        max_queued_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=config.drain_s,
        logging_config=logs,
    )(DocumentsDeployment).bind(config.retriever)


def _check_absolute(config: ApplicationConfig) -> None:
    """Replicas run in another working directory, often on another machine, than whoever wrote a relative path."""
    deltas = config.generator.deltas.items()
    paths = {f"generator.deltas.{name}": folder for name, folder in deltas if not is_reference(folder)}
    if config.retriever.index is not None:
        paths["retriever.index"] = config.retriever.index
    if config.retriever.documents is not None:
        paths["retriever.documents"] = config.retriever.documents
    if config.access.keys_file is not None:
        paths["access.keys_file"] = config.access.keys_file
    for name in ("embedder", "reranker"):
        model = getattr(config.retriever, name)
        if model is not None and model.startswith("."):
            paths[f"retriever.{name}"] = model
    if config.generator.model.startswith("."):
        paths["generator.model"] = config.generator.model
    for key, path in paths.items():
        if not Path(path).is_absolute():
            raise UserError(f"{key}={path!r}: give an absolute path, the same on every node that needs it")
