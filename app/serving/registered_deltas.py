"""Deltas that settings name by the model registry: `models:/NAME@ALIAS`, `models:/NAME/VERSION`.

A server follows an alias: what `pacos promote` moves it to is answered with soon. A batch looks it up once, so that all
its workers answer with the same version.
"""

import re
from pathlib import Path

from app.config import GenerateConfig, GeneratorConfig, StoreConfig
from app.tracking.registry import BEFORE, SCHEME, NotRegistered, fetch, is_reference, pinned
from app.tracking.store import tracking_uri


def with_registry(config: GeneratorConfig) -> GeneratorConfig:
    """`config` with the registry's own address in place of `auto`, for replicas that run elsewhere.

    Raises:
        UserError: a name, alias or version is not registered, or the registry does not answer.
    """
    references = [delta for delta in config.deltas.values() if is_reference(delta)]
    if not references and not config.load_registered:
        return config
    uri = tracking_uri(config.tracking.uri)
    for reference in references:
        pinned(reference, uri=uri)
    return config.model_copy(update={"tracking": StoreConfig(uri=uri)})


def with_pinned_delta(config: GenerateConfig) -> GenerateConfig:
    """`config` with a version in place of an alias, and a folder absolute, for workers in other directories.

    Raises:
        UserError: as `with_registry`.
    """
    if config.delta is None:
        return config
    if not is_reference(config.delta):
        return config.model_copy(update={"delta": str(Path(config.delta).expanduser().absolute())})
    uri = tracking_uri(config.tracking.uri)
    return config.model_copy(update={"delta": pinned(config.delta, uri=uri), "tracking": StoreConfig(uri=uri)})


def follows_alias(delta: str) -> bool:
    return is_reference(delta) and "@" in delta


def production(name: str) -> str | None:
    """How the registry's `name` in production is asked for; None if nothing there can have such a name."""
    return f"{SCHEME}{name}@production" if re.fullmatch(r"[\w.-]+", name) else None


def version_now(delta: str, tracking: StoreConfig) -> str:
    """A reference's version, as a reference; a folder stays one.

    Raises:
        NotRegistered: there is no such name, alias or version.
        UserError: the registry does not answer.
    """
    return pinned(delta, uri=tracking.uri) if is_reference(delta) else delta


def version_before(delta: str, tracking: StoreConfig) -> str | None:
    """The version, as a reference, that had the alias before, if `delta` is one and has been moved.

    Raises:
        UserError: the registry does not answer.
    """
    if not follows_alias(delta):
        return None
    try:
        return pinned(delta + BEFORE, uri=tracking.uri)
    except NotRegistered:
        return None


def delta_folder(delta: str, tracking: StoreConfig) -> Path:
    """Where a delta that settings name is on this machine; it is fetched if need be.

    Raises:
        UserError: it cannot be had, or is not what was registered.
    """
    return fetch(delta, uri=tracking.uri) if is_reference(delta) else Path(delta)
