"""Sweeps over small prepared data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.config import SweepConfig, validate


@pytest.fixture
def sweep_of(tiny_model: Path, tiny_shards: Path, tmp_path: Path) -> Callable[..., SweepConfig]:
    """A sweep of two ranks in a grid, without finals, with other `settings`."""

    def make(**settings: Any) -> SweepConfig:
        train = {
            "data": str(tiny_shards),
            "model": str(tiny_model),
            "batch_size": 4,
            "max_steps": 8,
            "eval_every": 2,
            "save_every": 4,
            "precision": "fp32",
            "workers": {"cpus": 2, "threads": 1},
            "optimizer": {"learning_rate": 1e-2},
            **settings.pop("train", {}),
        }
        given = {
            "space": {"method.rank": [1, 2]},
            "search": {"type": "grid"},
            "scheduler": {"type": "none"},
            "finals": {"trials": 0},
            **settings,
        }
        return validate(SweepConfig, {"train": train, "output": str(tmp_path / "sweep"), **given})

    return make
