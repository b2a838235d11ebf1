"""A tiny GPT-2 with clear-cut random logits, as `transformers` sees it and as the engine does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from app.engine.kernels import _compiled
from app.models.checkpoints import load_decoder
from app.models.decoder import Decoder

VOCAB_SIZE = 97
CONTEXT_LENGTH = 48


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Several would wait for each other longer than such a small model computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reference() -> GPT2LMHeadModel:
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT_LENGTH,
        n_embd=32,
        n_layer=3,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:  # fresh weights give logits that are almost tied, and one token again and again
                parameter.mul_(30.0 if "wpe" in name else 12.0)
    return model


@pytest.fixture(scope="session")
def model(reference: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder: Path = tmp_path_factory.mktemp("gpt2")
    reference.save_pretrained(folder)
    return load_decoder(folder)


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest) -> str:
    """`EngineSettings.kernels`: the compiled ones where there is a compiler, and torch's operations."""
    if request.param == "torch":
        return "torch"
    if _compiled() is None:
        pytest.skip("no C compiler on this machine")
    return "auto"


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Of lengths 1 to 30, so that rows of a batch differ."""
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 1, 17, 30, 2, 9, 23, 12]
    return [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
