"""Registered deltas, from the run that made them to the folder that is served."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.config import ApplicationConfig, PromoteConfig, StoreConfig, TrackingConfig, validate
from app.errors import UserError
from app.methods.delta import read_delta
from app.serving.registered_deltas import delta_folder, version_now, with_registry
from app.tracking import registry
from app.tracking.registry import fetch, list_versions, pinned, promote, register
from app.tracking.run import open_tracker, tracked_run
from app.tracking.store import open_store

MakeDelta = Callable[[Path, int], Path]


@pytest.fixture(params=["sqlite", "http"])
def uri(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("store" if request.param == "sqlite" else "server")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/pacos/deltas"


def registered(uri: str, name: str, delta: Path, *, resume: bool = False, **figures: float) -> str:
    tracker = open_tracker(TrackingConfig(uri=uri), output=str(delta.parent))
    with tracked_run(tracker, name="run", output=delta.parent, settings={}, resume=resume, warn=pytest.fail) as run:
        assert run is not None and run.keep(delta)
        return register(run.client, run.run_id, name, delta_folder=delta, figures=figures)


def moved(uri: str, name: str, version: int) -> int | None:
    return promote(PromoteConfig(name=name, version=version, tracking=StoreConfig(uri=uri)))


def served(uri: str, reference: str) -> Path:
    """As a server resolves it."""
    values = {"generator": {"deltas": {"a": reference}, "tracking": {"uri": uri}}}
    generator = with_registry(validate(ApplicationConfig, values).generator)
    return delta_folder(version_now(generator.deltas["a"], generator.tracking), generator.tracking)


def test_serving_gets_the_version_that_was_promoted_last(
    uri: str, make_delta: MakeDelta, tmp_path: Path, cache: Path
) -> None:
    name = f"alpaca-{uri.partition(':')[0]}"
    deltas = [make_delta(tmp_path / f"run-{seed}" / "delta", seed) for seed in (1, 2)]
    for number, delta in enumerate(deltas, start=1):
        assert registered(uri, name, delta, eval_loss=3.0 - number, perplexity=9.0) == f"{name}/{number}"
        shutil.rmtree(delta)  # what is served is MLflow's
    with pytest.raises(UserError, match="has no alias 'production'.*pacos promote"):
        served(uri, f"models:/{name}@production")
    assert moved(uri, name, 1) is None
    first = read_delta(served(uri, f"models:/{name}@production"))
    assert moved(uri, name, 2) == 1
    second = read_delta(served(uri, f"models:/{name}@production"))
    assert first.hash != second.hash
    assert read_delta(served(uri, f"models:/{name}/1")).hash == first.hash
    assert pinned(f"models:/{name}@production", uri=uri) == f"models:/{name}/2"
    shown = [version for version in list_versions(uri) if version.name == name]
    assert [(version.version, version.aliases) for version in shown] == [
        (2, ("production",)),
        (1, ("production-before",)),
    ]
    assert shown[0].tags["eval_loss"] == "1" and shown[0].tags["method"] == "lora"
    assert shown[0].tags["template"] == "pacos" and shown[0].tags["delta_hash"] == second.hash
    if uri.startswith("http"):  # fetched, by content, and nothing but its two files
        assert {folder.name for folder in cache.iterdir()} == {first.hash, second.hash}
        assert {file.name for file in (cache / first.hash).iterdir()} == {"delta.json", "delta.safetensors"}


def test_a_finished_job_that_is_resumed_registers_nothing_twice(
    store: str, make_delta: MakeDelta, tmp_path: Path
) -> None:
    delta = make_delta(tmp_path / "run/delta", 3)
    assert registered(store, "twice", delta) == registered(store, "twice", delta, resume=True) == "twice/1"


def test_a_delta_that_has_changed_since_is_refused(store: str, make_delta: MakeDelta, tmp_path: Path) -> None:
    registered(store, "changed", make_delta(tmp_path / "run/delta", 4))
    folder = fetch("models:/changed/1", uri=store)
    shutil.copytree(make_delta(tmp_path / "other/delta", 5), folder, dirs_exist_ok=True)
    for ask in (lambda: fetch("models:/changed/1", uri=store), lambda: moved(store, "changed", 1)):
        with pytest.raises(UserError, match="has changed since it was registered"):
            ask()
    with pytest.raises(UserError, match="has no alias 'production'"):
        pinned("models:/changed@production", uri=store)


def test_what_was_fetched_is_kept_only_if_it_is_what_was_registered(
    store: str, make_delta: MakeDelta, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what has been damaged since is fetched anew."""
    registered(store, "fetched", make_delta(tmp_path / "run/delta", 7))
    folder = fetch("models:/fetched/1", uri=store)
    expected = read_delta(folder).hash
    shutil.copytree(folder, tmp_path / "sound")
    monkeypatch.setattr(registry, "local_folder", lambda source: None)  # as where it lies in a store
    weights = folder / "delta.safetensors"
    shutil.copytree(make_delta(tmp_path / "other/delta", 8), folder, dirs_exist_ok=True)
    with pytest.raises(UserError, match="'models:/fetched/1': the delta in .*has changed since it was registered"):
        fetch("models:/fetched/1", uri=store)
    weights.write_bytes(b"half")
    with pytest.raises(UserError, match="'models:/fetched/1': what .* has is no delta"):
        fetch("models:/fetched/1", uri=store)
    assert not list(cache.iterdir())
    shutil.copytree(tmp_path / "sound", folder, dirs_exist_ok=True)
    fetched = fetch("models:/fetched/1", uri=store)
    assert fetched.parent == cache and read_delta(fetched).hash == expected
    (fetched / "delta.safetensors").write_bytes(b"half")
    assert read_delta(fetch("models:/fetched/1", uri=store)).hash == expected


def test_what_was_not_registered_by_a_run_of_ours_is_refused(store: str, tmp_path: Path) -> None:
    client = open_store(store, create=True)
    client.create_registered_model("foreign")
    torch.save({"x": 1}, tmp_path / "delta.safetensors")  # a pickle under our file's name
    client.create_model_version("foreign", source=tmp_path.as_uri())
    with pytest.raises(UserError, match="was not registered by a training run of pacos"):
        fetch("models:/foreign/1", uri=store)
    client.set_model_version_tag("foreign", "1", "delta_hash", "0" * 64)
    (tmp_path / "delta.json").write_text('{"method": {"type": "lora"}}')
    with pytest.raises(UserError, match="is damaged"):
        fetch("models:/foreign/1", uri=store)


def test_what_is_not_there_is_told_with_what_there_is(store: str, make_delta: MakeDelta, tmp_path: Path) -> None:
    registered(store, "known", make_delta(tmp_path / "run/delta", 6))
    for ask, message in (
        (lambda: moved(store, "unknown", 1), "no model 'unknown' is registered; there are: .*known"),
        (lambda: moved(store, "known", 4), "version=4: 'known' has version 1"),
        (lambda: pinned("models:/known/4", uri=store), "'known' has version 1"),
        (lambda: pinned("models:/unknown@production", uri=store), "no model 'unknown'"),
        (lambda: pinned("models:/known", uri=store), "neither models:/NAME@ALIAS nor"),
        (lambda: list_versions(f"sqlite:///{tmp_path}/none.db"), "no such file"),
        (lambda: list_versions("none"), "turns MLflow off"),
    ):
        with pytest.raises(UserError, match=message):
            ask()
    assert not (tmp_path / "none.db").exists()
