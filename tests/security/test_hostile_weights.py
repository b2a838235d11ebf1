"""Models, deltas and checkpoints that someone made to run code, to read other files, or to take all memory or time."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile_files import LIES, NESTED, a_pickle, make_enormous
from safetensors.torch import save_file

from app.config import ComposedConfig, ExtraBlockConfig, LoraConfig, PrefixConfig
from app.config.methods import MethodConfig
from app.data.prompts import resolve_template
from app.engine.deltas import MixedModel
from app.errors import UserError
from app.methods import apply_method
from app.methods.delta import Delta, apply_delta, read_delta, write_delta
from app.methods.peft_format import read_peft
from app.models.checkpoints import load_decoder, read_config
from app.training.checkpointing import Checkpoint, read_checkpoint, write_checkpoint
from app.training.optimizer import trained_parameters

pytestmark = pytest.mark.timeout(120)

Make = Callable[[Path], Callable[[], object]]
"""Fills a folder with a good one of its kind, and returns how it is read."""


@pytest.fixture
def delta(tiny_model: Path) -> Delta:
    model = load_decoder(tiny_model)
    apply_method(model, LoraConfig(rank=2))
    weights = {name: parameter.detach() for name, parameter in trained_parameters(model).items()}
    return Delta(LoraConfig(rank=2), weights, {"base": "tiny"})


@pytest.fixture
def folders(tiny_model: Path, delta: Delta, tmp_path: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """By kind: a good folder, and what reads it."""
    names = ("model", "delta", "checkpoint", "peft")
    model, plain, checkpoint, peft = (tmp_path / name for name in names)
    for folder in (plain, checkpoint, peft):
        folder.mkdir()
    shutil.copytree(tiny_model, model)
    write_delta(plain, delta)
    write_checkpoint(checkpoint, Checkpoint(3, {"w": torch.ones(2)}, {"w.m": torch.ones(2)}))
    save_file({"prompt_embeddings": torch.zeros(3, 32)}, peft / "adapter_model.safetensors")
    settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
    (peft / "adapter_config.json").write_text(json.dumps(settings))
    shape = read_config(tiny_model)
    return {
        "model": (model, lambda: load_decoder(model)),
        "delta": (plain, lambda: read_delta(plain)),
        "checkpoint": (checkpoint, lambda: read_checkpoint(checkpoint)),
        "peft": (peft, lambda: read_peft(peft, shape=shape, metadata={})),
    }


WEIGHTS = [
    ("model", "model.safetensors"),
    ("delta", "delta.safetensors"),
    ("checkpoint", "weights.safetensors"),
    ("checkpoint", "moments.safetensors"),
    ("peft", "adapter_model.safetensors"),
]
SETTINGS = [
    ("model", "config.json"),
    ("delta", "delta.json"),
    ("checkpoint", "state.json"),
    ("peft", "adapter_config.json"),
]


def put(folder: Path, name: str, content: bytes) -> None:
    """In the place of the file there; a checkpoint's state then says of it what is true."""
    (folder / name).write_bytes(content)
    if folder.name == "checkpoint" and name != "state.json":
        import hashlib

        state = json.loads((folder / "state.json").read_text())
        state["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(("kind", "name"), WEIGHTS)
@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies_is_refused(folders, kind: str, name: str, lie: str) -> None:
    folder, read = folders[kind]
    read()
    put(folder, name, LIES[lie])
    with pytest.raises(UserError, match="damaged"):
        read()


@pytest.mark.parametrize(("kind", "name"), WEIGHTS)
def test_a_pickle_in_the_place_of_weights_is_not_loaded(folders, kind: str, name: str, tmp_path: Path) -> None:
    folder, read = folders[kind]
    put(folder, name, a_pickle(tmp_path / "attacked"))
    with pytest.raises(UserError):
        read()
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("kind", ["model", "delta", "checkpoint", "peft"])
def test_a_pickle_beside_the_weights_is_not_looked_at(folders, kind: str, tmp_path: Path) -> None:
    folder, read = folders[kind]
    for name in ("pytorch_model.bin", "delta.pkl", "optimizer.pt", "training_args.bin", "adapter_model.bin"):
        (folder / name).write_bytes(a_pickle(tmp_path / "attacked"))
    read()
    assert not (tmp_path / "attacked").exists()
    for name in [name for of, name in WEIGHTS if of == kind]:
        (folder / name).unlink()
    with pytest.raises(UserError):
        read()
    assert not (tmp_path / "attacked").exists(), "nor where the weights are not there"


@pytest.mark.parametrize(("kind", "name"), SETTINGS)
@pytest.mark.parametrize("content", [NESTED, b"\xff\xfe", b"null", b"[]", b'{"a": ' + b"9" * 10_000 + b"}"])
def test_settings_that_are_no_settings_are_refused(folders, kind: str, name: str, content: bytes) -> None:
    folder, read = folders[kind]
    (folder / name).write_bytes(content)
    with pytest.raises(UserError):
        read()


@pytest.mark.parametrize(("kind", "name"), SETTINGS)
def test_an_enormous_file_of_settings_is_not_read_to_its_end(folders, kind: str, name: str) -> None:
    folder, read = folders[kind]
    make_enormous(folder / name)
    with pytest.raises(UserError, match="longer than"):
        read()


@pytest.mark.parametrize(("kind", "name"), [*WEIGHTS, *SETTINGS])
@pytest.mark.parametrize("instead", ["a device", "a pipe"])
def test_a_link_to_what_does_not_end_is_refused(folders, kind: str, name: str, instead: str) -> None:
    folder, read = folders[kind]
    (folder / name).unlink()
    if instead == "a pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(UserError):
        read()


@pytest.mark.parametrize("listed", ["../delta/delta.safetensors", "/etc/hostname", "sub/model.safetensors", 3, None])
def test_an_index_of_weights_names_files_of_its_own_folder_alone(folders, listed: object) -> None:
    folder, read = folders["model"]
    (folder / "sub").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "sub")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": listed}}))
    with pytest.raises(UserError, match="weight_map|no file of this folder"):
        read()


def test_a_checkpoint_is_checked_by_its_own_two_files_alone(folders) -> None:
    folder, read = folders["checkpoint"]
    state = json.loads((folder / "state.json").read_text())
    elsewhere = {"/dev/zero": {"bytes": 0, "sha256": ""}}
    for files in (elsewhere, state["files"] | elsewhere):
        (folder / "state.json").write_text(json.dumps(state | {"files": files}))
        if files is elsewhere:
            with pytest.raises(UserError, match="damaged"):
                read()
        else:
            read()


@pytest.mark.parametrize(
    "values",
    [
        {"n_layer": 10**9}, {"n_embd": 10**9}, {"vocab_size": 10**30}, {"n_positions": 10**12}, {"n_inner": 10**12},
        {"n_head": 0}, {"n_inner": "many"}, {"vocab_size": -5},
        {"model_type": "pacos", "architecture": {"vocab_size": 400, "context_length": 96, "num_layers": 10**9,
                                                 "num_heads": 2, "width": 32, "mlp_width": 64}},
    ],
)  # fmt: skip
def test_a_model_that_asks_for_all_memory_is_refused_before_it_gets_any(folders, values: dict) -> None:
    folder, read = folders["model"]
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | values))
    with pytest.raises(UserError):
        read()


@pytest.mark.parametrize(
    "method",
    [
        ExtraBlockConfig(count=10**9),
        PrefixConfig(length=4, mlp_width=10**12),
        PrefixConfig(length=10**9),
        LoraConfig(rank=10**9),
        ComposedConfig(parts=(LoraConfig(rank=2), ExtraBlockConfig(count=10**9))),
    ],
    ids=lambda method: method.type,
)
def test_a_delta_that_asks_for_all_memory_is_refused_before_it_gets_any(
    tiny_model: Path, delta: Delta, method: MethodConfig
) -> None:
    hostile = Delta(method, delta.weights, delta.metadata)
    with pytest.raises(UserError):
        apply_delta(load_decoder(tiny_model), hostile)
    with pytest.raises(UserError):
        MixedModel(load_decoder(tiny_model), num_extra_layers=2, kernels=None).variant(hostile)


@pytest.mark.parametrize("content", [NESTED, b'{"chat_template": ["x"]}', b'{"chat_template": "{{ "}'])
def test_a_tokenizers_settings_are_data_too(tiny_model: Path, tmp_path: Path, content: bytes) -> None:
    from app.config.data import ChatTemplateConfig

    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError):
        resolve_template(ChatTemplateConfig(), tokenizer_folder=tmp_path / "model")
