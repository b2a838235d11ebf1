"""A real MLflow server, and a delta to register."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mlflow_process import mlflow_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("flask")
    with mlflow_server(tmp_path_factory.mktemp("mlflow-server")) as (url, _):
        yield url


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store: making one takes seconds, so that tests share it and keep apart by experiment and name."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def make_delta(tiny_model: Path) -> Callable[..., Path]:
    """`make_delta(folder, seed)`: a LoRA of `tiny_model` with random weights, written to `folder`."""
    from app.config.methods import LoraConfig
    from app.data.tokenization import load_tokenizer
    from app.methods import apply_method
    from app.methods.delta import Delta, write_delta
    from app.models.checkpoints import load_decoder, weights_hash

    def make(folder: Path, seed: int) -> Path:
        model, method = load_decoder(tiny_model), LoraConfig(rank=2)
        apply_method(model, method)
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.randn(parameter.shape, generator=generator)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        metadata = {
            "base": str(tiny_model),
            "base_hash": weights_hash(tiny_model),
            "tokenizer_hash": load_tokenizer(tiny_model).fingerprint(),
            "template": {"type": "pacos"},
        }
        folder.mkdir(parents=True)
        write_delta(folder, Delta(method, weights, metadata))
        return folder

    return make
