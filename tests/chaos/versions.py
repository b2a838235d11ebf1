"""Two versions of a delta in a model registry, to be promoted in turn."""

from pathlib import Path
from typing import NoReturn

import torch

from app.config import PromoteConfig, StoreConfig, TrackingConfig
from app.config.methods import LoraConfig
from app.data.tokenization import load_tokenizer
from app.methods import apply_method
from app.methods.delta import Delta, write_delta
from app.models.checkpoints import load_decoder, weights_hash
from app.tracking.registry import promote, register
from app.tracking.run import open_tracker, tracked_run


class Versions:
    """Of `served`, over `model`; the first is promoted."""

    served = "models:/served@production"

    def __init__(self, folder: Path, model: Path) -> None:
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.folders = [str(self._register(folder / f"version-{seed}", model, seed)) for seed in (1, 2)]
        self.promote(1)

    def promote(self, version: int) -> None:
        promote(PromoteConfig(name="served", version=version, tracking=StoreConfig(uri=self.uri)))

    def _register(self, output: Path, model: Path, seed: int) -> Path:
        delta = output / "delta"
        tracker = open_tracker(TrackingConfig(uri=self.uri), output=str(output))
        with tracked_run(tracker, name="served", output=output, settings={}, resume=False, warn=_fail) as run:
            _write_random_delta(delta, model, seed=seed)
            assert run is not None and run.keep(delta)
            register(run.client, run.run_id, "served", delta_folder=delta, figures={})
        return delta


def _write_random_delta(folder: Path, base: Path, *, seed: int) -> None:
    model, method, draw = load_decoder(base), LoraConfig(rank=2), torch.Generator().manual_seed(seed)
    apply_method(model, method)
    weights = {
        name: parameter.detach() + 0.5 * torch.randn(parameter.shape, generator=draw)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    tokenizer = load_tokenizer(base).fingerprint()
    folder.mkdir(parents=True)
    metadata = {"base": str(base), "base_hash": weights_hash(base), "tokenizer_hash": tokenizer}
    write_delta(folder, Delta(method, weights, metadata))


def _fail(message: str) -> NoReturn:
    raise AssertionError(message)
