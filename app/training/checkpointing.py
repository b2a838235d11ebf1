"""A training checkpoint: trained weights, AdamW's moments and the step, as safetensors and JSON in one folder.

Frozen weights are not in it (the base is), and nothing in it depends on the number of workers.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.atomic import replaced_folder
from app.errors import UserError

_STATE, _WEIGHTS, _MOMENTS = _FILES = ("state.json", "weights.safetensors", "moments.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Fill `folder`, which exists. Whoever calls this makes the folder appear as a whole."""
    save_file(checkpoint.weights, folder / _WEIGHTS)
    save_file(checkpoint.moments, folder / _MOMENTS)
    (folder / _STATE).write_text(json.dumps({"step": checkpoint.step}) + "\n")


def read_checkpoint(folder: Path) -> Checkpoint:
    """What `write_checkpoint` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        state = json.loads((folder / _STATE).read_text())
        return Checkpoint(
            step=state["step"],
            weights=load_file(folder / _WEIGHTS),
            moments=load_file(folder / _MOMENTS),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {str(folder)!r} is damaged ({error}); remove that folder to go on from the one before it"
        ) from None


def save_step(folder: Path, checkpoint: Checkpoint, *, keep: int) -> None:
    """Write `folder/step-…` in one rename, then remove all but the newest `keep`."""
    with replaced_folder(folder / f"step-{checkpoint.step:08d}", contents=_FILES) as staging:
        write_checkpoint(staging, checkpoint)
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)


def latest_step(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, None where there is none."""
    complete = _complete(folder)
    return read_checkpoint(complete[-1]) if complete else None


def latest_step_number(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, 0 where there is none."""
    complete = _complete(folder)
    return int(complete[-1].name.removeprefix("step-")) if complete else 0


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / _STATE).is_file())
