"""Deltas that a server's settings name by the model registry: `models:/NAME@ALIAS`, `models:/NAME/VERSION`.

An alias is looked up once, when the application is built, so that all its replicas, those of a later hour too, answer
with the same version. A promotion takes effect at the next start.
"""

from pathlib import Path

from app.config import GenerateConfig, GeneratorConfig, StoreConfig
from app.tracking.registry import fetch, is_reference, pinned
from app.tracking.store import tracking_uri


def with_pinned_deltas(config: GeneratorConfig) -> GeneratorConfig:
    """`config` with a version in place of each alias, and the registry's own address in place of `auto`.

    Raises:
        UserError: a name, alias or version is not registered, or the registry does not answer.
    """
    if not any(map(is_reference, config.deltas.values())):
        return config
    uri = tracking_uri(config.tracking.uri)
    deltas = {name: pinned(delta, uri=uri) if is_reference(delta) else delta for name, delta in config.deltas.items()}
    return config.model_copy(update={"deltas": deltas, "tracking": StoreConfig(uri=uri)})


def with_pinned_delta(config: GenerateConfig) -> GenerateConfig:
    """The same for the one delta of a batch; that of a folder becomes absolute, for workers in other directories."""
    if config.delta is None:
        return config
    if not is_reference(config.delta):
        return config.model_copy(update={"delta": str(Path(config.delta).expanduser().absolute())})
    uri = tracking_uri(config.tracking.uri)
    return config.model_copy(update={"delta": pinned(config.delta, uri=uri), "tracking": StoreConfig(uri=uri)})


def delta_folder(delta: str, tracking: StoreConfig) -> Path:
    """Where a delta that settings name is on this machine; it is fetched if need be.

    Raises:
        UserError: it cannot be had, or is not what was registered.
    """
    return fetch(delta, uri=tracking.uri) if is_reference(delta) else Path(delta)
