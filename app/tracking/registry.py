"""MLflow's model registry: deltas by name and version, and the alias that serving reads.

Of the store's files only a delta's two are fetched, safetensors and JSON, and only if they hash to what was
registered. Nothing is unpickled, and no code of MLflow's model flavours runs.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.atomic import replaced_folder
from app.config.methods import name_of
from app.config.tracking import PromoteConfig
from app.errors import UserError
from app.tracking.run import RUN_FILE
from app.tracking.store import local_folder, open_store, told_as_mistakes, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

    from app.methods.delta import Delta

SCHEME = "models:/"
BEFORE = "-before"
"""Ends the alias of the version that had the alias before."""
_HASH = "delta_hash"


class NotRegistered(UserError):
    """The registry has no such name, alias or version."""


@dataclass(frozen=True)
class Version:
    """One line of `pacos models`."""

    name: str
    version: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    """`method`, `base`, `eval_loss`, `perplexity`, …"""


def register(client: "MlflowClient", run_id: str, name: str, *, delta_folder: Path, figures: Mapping[str, Any]) -> str:
    """The finished run's delta, already among its artifacts, as the next version of `name`; returns `NAME/VERSION`.

    A run that is resumed after its end does not make a second version of the same delta.
    """
    from app.methods.delta import read_delta

    delta = read_delta(delta_folder)
    if not _exists(client, name):
        client.create_registered_model(name)
    for version in client.search_model_versions(f"name='{name}'"):
        if version.run_id == run_id and version.tags.get(_HASH) == delta.hash:
            return f"{name}/{version.version}"
    template = delta.metadata.get("template")
    tags = {
        _HASH: delta.hash,
        "method": name_of(delta.method),
        "base": delta.metadata["base"],
        "base_hash": delta.metadata["base_hash"],
        "tokenizer_hash": delta.metadata["tokenizer_hash"],
        "template": template["type"] if template else "",
        **{key: f"{value:.6g}" for key, value in figures.items() if isinstance(value, int | float)},
    }
    source = f"{client.get_run(run_id).info.artifact_uri}/{delta_folder.name}"
    made = client.create_model_version(name, source=source, run_id=run_id, tags=tags)
    return f"{name}/{made.version}"


def register_finished(run: Path, name: str, *, uri: str) -> int:
    """The delta of a run that is over, from its folder; returns its version under `name`.

    Raises:
        UserError: the run was not tracked, or has no delta.
    """
    file = run / RUN_FILE
    if not file.is_file():
        raise UserError(f"{str(run)!r} was not tracked; a registered model needs its MLflow run")
    summary = json.loads((run / "result.json").read_text())
    client = open_store(uri)
    with told_as_mistakes(uri):
        made = register(
            client,
            json.loads(file.read_text())["run_id"],
            name,
            delta_folder=run / "delta",
            figures=figures_of_summary(summary),
        )
    return int(made.rpartition("/")[2])


def figures_of_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a version says of its run."""
    names = {"eval_loss_after": "eval_loss", "perplexity_after": "perplexity", "cost": "cost"}
    return {name: summary[key] for key, name in names.items()}


def _exists(client: "MlflowClient", name: str) -> bool:
    return bool(client.search_registered_models(f"name='{name}'", max_results=1))


def promote(config: PromoteConfig) -> int | None:
    """Move the alias, to a version whose delta can be had; returns the version that had it, which `ALIAS-before` names
    from then on.

    Raises:
        UserError: there is no such name or version, or its delta is not what was registered.
    """
    uri = tracking_uri(config.tracking.uri)
    client = open_store(uri)
    with told_as_mistakes(uri):
        versions = _versions(client, config.name)
        if str(config.version) not in versions:
            raise UserError(f"version={config.version}: {config.name!r} has {_listed(versions)}")
    fetch(f"{SCHEME}{config.name}/{config.version}", uri=uri)
    with told_as_mistakes(uri):
        before = _aliases(client, config.name).get(config.alias)
        if before is not None and before != str(config.version):
            client.set_registered_model_alias(config.name, config.alias + BEFORE, before)
        client.set_registered_model_alias(config.name, config.alias, str(config.version))
    return None if before is None else int(before)


def list_versions(uri: str) -> list[Version]:
    """All that is registered, by name, the newest version first.

    Raises:
        UserError: the store is not there.
    """
    uri = tracking_uri(uri)
    client = open_store(uri)
    with told_as_mistakes(uri):
        return [
            Version(name, int(version.version), tuple(sorted(_pointing_at(aliases, version))), version.tags)
            for name in _names(client)
            for aliases in [_aliases(client, name)]
            for version in sorted(_versions(client, name).values(), key=lambda found: -int(found.version))
        ]


def is_reference(delta: str) -> bool:
    return delta.startswith(SCHEME)


def pinned(reference: str, *, uri: str) -> str:
    """`models:/NAME@ALIAS` as the `models:/NAME/VERSION` that it means now.

    Raises:
        NotRegistered: there is no such name, alias or version.
        UserError: it is no reference, or the store does not answer.
    """
    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if found is None:
        raise UserError(f"{reference!r} is neither models:/NAME@ALIAS nor models:/NAME/VERSION")
    name, alias, version = found.groups()
    uri = tracking_uri(uri)
    client = open_store(uri)
    with told_as_mistakes(uri):
        versions = _versions(client, name)
        if alias is not None:
            aliases = _aliases(client, name)
            if alias not in aliases:
                known = ", ".join(sorted(aliases)) or "none"
                raise NotRegistered(
                    f"{reference!r}: {name!r} has no alias {alias!r} (it has {known}); "
                    f"`pacos promote {name} VERSION` sets production"
                )
            version = aliases[alias]
        if version not in versions:
            raise NotRegistered(f"{reference!r}: {name!r} has {_listed(versions)}")
    return f"{SCHEME}{name}/{version}"


def fetch(reference: str, *, uri: str) -> Path:
    """The folder with the delta that `models:/NAME/VERSION` is, on this machine, proved to be what was registered.

    Raises:
        UserError: it cannot be had, or is not what was registered.
    """
    reference, uri = pinned(reference, uri=uri), tracking_uri(uri)
    name, _, version = reference.removeprefix(SCHEME).rpartition("/")
    from app.methods.delta import read_delta

    client = open_store(uri)
    with told_as_mistakes(uri):
        expected = client.get_model_version(name, version).tags.get(_HASH)
        if not expected:
            raise UserError(f"{reference!r} was not registered by a training run of pacos")
        source = client.get_model_version_download_uri(name, version)
    folder = local_folder(source)
    if folder is None:
        with told_as_mistakes(uri):
            return _downloaded(source, expected, reference=reference, uri=uri)
    _check_hash(read_delta(folder), expected, reference=reference, place=str(folder))
    return folder


def _check_hash(delta: "Delta", expected: str, *, reference: str, place: str) -> None:
    if delta.hash != expected:
        raise UserError(
            f"{reference!r}: the delta in {place!r} has changed since it was registered ({_HASH}={delta.hash[:16]!r}, "
            f"not {expected[:16]!r}); register it anew, or restore it"
        )


def _downloaded(source: str, delta_hash: str, *, reference: str, uri: str) -> Path:
    """In the cache by content, so that a version is fetched once. What is not what was registered never gets there, and
    what has been damaged there is fetched anew."""
    import mlflow.artifacts

    from app.methods.delta import DELTA_FILES, read_delta

    if not re.fullmatch("[0-9a-f]{64}", delta_hash):  # it becomes a folder's name
        raise UserError(f"{source}: {_HASH}={delta_hash!r} is no hash")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "pacos" / "deltas" / delta_hash
    if _holds(folder, delta_hash):
        return folder
    with replaced_folder(folder, contents=DELTA_FILES) as staging:
        for file in DELTA_FILES:
            mlflow.artifacts.download_artifacts(f"{source}/{file}", dst_path=str(staging), tracking_uri=uri)
        try:
            delta = read_delta(staging)
        except UserError as error:
            raise UserError(f"{reference!r}: what {source!r} has is no delta ({error})") from None
        _check_hash(delta, delta_hash, reference=reference, place=source)
    return folder


def _holds(folder: Path, delta_hash: str) -> bool:
    from app.methods.delta import read_delta

    try:
        return read_delta(folder).hash == delta_hash
    except UserError:  # it is not there, or damaged
        return False


def _versions(client: "MlflowClient", name: str) -> dict[str, "ModelVersion"]:
    """By number. Raises `NotRegistered` where there is no such model."""
    if not _exists(client, name):
        known = ", ".join(_names(client)) or "none"
        raise NotRegistered(f"no model {name!r} is registered; there are: {known}")
    return {str(version.version): version for version in client.search_model_versions(f"name='{name}'")}


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    """Versions by alias; searching does not fill these in."""
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def _pointing_at(aliases: Mapping[str, str], version: "ModelVersion") -> list[str]:
    return [alias for alias, number in aliases.items() if number == str(version.version)]


def _names(client: "MlflowClient") -> list[str]:
    return sorted(model.name for model in client.search_registered_models(max_results=1000))


def _listed(versions: Mapping[str, Any]) -> str:
    if not versions:
        return "no versions"
    numbers = ", ".join(sorted(versions, key=int))
    return f"{'versions' if len(versions) > 1 else 'version'} {numbers}"
