"""A training checkpoint: trained weights, the optimizer's moments and where the run stands, as files in one folder.

Safetensors and JSON, no pickle. Frozen weights are not in it (the base is), and nothing in it depends on the number of
workers. Where such folders lie, and which are kept, is `checkpoint_store.py`'s.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from app.errors import UserError
from app.foreign_json import read_json

if TYPE_CHECKING:  # Ray's processes that only look which checkpoints there are do without torch, and its seconds
    from torch import Tensor

STATE_FILE, _WEIGHTS, _MOMENTS = CHECKPOINT_FILES = ("state.json", "weights.safetensors", "moments.safetensors")
"""The state comes last in time: it says the others' sizes and hashes, so where it stands they are whole."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    weights: "dict[str, Tensor]"
    moments: "dict[str, Tensor]"
    state: Mapping[str, Any] = field(default_factory=dict)
    """What else `state.json` says; `trainer.py` writes and checks it."""


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Fill `folder`, which exists, down to the disk. Whoever calls this makes the folder appear as a whole."""
    from safetensors.torch import save_file

    save_file(checkpoint.weights, folder / _WEIGHTS)
    save_file(checkpoint.moments, folder / _MOMENTS)
    files = {name: _fingerprint(folder / name) for name in (_WEIGHTS, _MOMENTS)}
    state = {"step": checkpoint.step, **checkpoint.state, "files": files}
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for name in CHECKPOINT_FILES:  # a rename may reach the disk before the content does
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())


def read_checkpoint(folder: Path) -> Checkpoint:
    """What `write_checkpoint` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    from safetensors.torch import load_file

    try:
        state = read_json(folder / STATE_FILE)
        for name in (_WEIGHTS, _MOMENTS):
            if not (folder / name).is_file() or _fingerprint(folder / name) != state["files"][name]:
                raise ValueError(f"{name} is not what was written")
        return Checkpoint(
            step=state["step"],
            weights=load_file(folder / _WEIGHTS),
            moments=load_file(folder / _MOMENTS),
            state={name: value for name, value in state.items() if name not in ("step", "files")},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {str(folder)!r} is damaged ({error}); remove that folder to go on from the one before it"
        ) from None


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
