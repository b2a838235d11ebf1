"""A tiny GPT-2 folder with clear-cut logits, an index, a delta, and what `transformers` continues a prompt with."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from app.config.methods import MethodConfig
from app.data.tokenization import Tokenizer, save_tokenizer, train_tokenizer
from app.models.checkpoints import load_decoder, weights_hash

DOCUMENTS = {
    "hay.md": "# Hay\n\nAn adult alpaca eats two kilograms of hay each day, and more in a cold winter.\n",
    "shearing.md": "# Shearing\n\nShearing takes place once a year in spring, with electric clippers.\n",
    "guards.md": "# Guards\n\nA pair of llamas will guard the herd from foxes and chase a stray dog away.\n",
}
CONTEXT_LENGTH = 2048


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([*DOCUMENTS.values(), "Ünïcödé — ñandú, 🦙 и альпака"] * 3, vocab_size=500)


@pytest.fixture(scope="session")
def reference(tokenizer: Tokenizer) -> GPT2LMHeadModel:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=CONTEXT_LENGTH, n_embd=48, n_layer=2, n_head=4,
        bos_token_id=tokenizer.end_id, eos_token_id=tokenizer.end_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:  # fresh weights give logits that are almost tied, and one token again and again
                parameter.mul_(30.0 if "wpe" in name else 12.0)
        model.transformer.wte.weight[tokenizer.end_id] = 0  # its logit is always 0: no answer ends by itself
    return model


@pytest.fixture(scope="session")
def model_dir(reference: GPT2LMHeadModel, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("served-model")
    reference.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def greedy(reference: GPT2LMHeadModel, tokenizer: Tokenizer) -> Callable[..., str]:
    """`greedy(prompt, max_tokens)`: the continuation that `transformers` gives."""

    def run(prompt: str, max_tokens: int) -> str:
        ids = tokenizer.encode(prompt)
        output = reference.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=max_tokens, do_sample=False
        )
        return tokenizer.decode(output[0, len(ids) :].tolist())

    return run


@pytest.fixture(scope="session")
def delta_dir(model_dir: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA delta of `model_dir` with random weights."""
    from app.config.schema import LoraConfig
    from app.methods import apply_method
    from app.methods.delta import Delta, write_delta

    model = load_decoder(model_dir)
    method = LoraConfig(rank=2)
    apply_method(model, method)
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    folder: Path = tmp_path_factory.mktemp("delta")
    metadata = {
        "base": str(model_dir), "base_hash": weights_hash(model_dir), "tokenizer_hash": tokenizer.fingerprint(),
        "template": {"type": "pacos"},
    }  # fmt: skip
    write_delta(folder, Delta(method, weights, metadata))
    return folder


@pytest.fixture(scope="session")
def make_delta(model_dir: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_delta(name, method, seed=…)`: a delta of `model_dir` with random weights."""
    from app.methods import apply_method
    from app.methods.delta import Delta, write_delta

    def make(name: str, method: MethodConfig, *, seed: int = 0) -> Path:
        model = load_decoder(model_dir)
        apply_method(model, method)
        generator = torch.Generator().manual_seed(seed)
        weights = {
            key: parameter + 0.5 * torch.randn(parameter.shape, generator=generator)
            for key, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        folder: Path = tmp_path_factory.mktemp(name)
        metadata = {
            "base": str(model_dir), "base_hash": weights_hash(model_dir), "tokenizer_hash": tokenizer.fingerprint(),
        }  # fmt: skip
        write_delta(folder, Delta(method, {key: weight.detach() for key, weight in weights.items()}, metadata))
        return folder

    return make


@pytest.fixture(scope="session")
def registry(tracking_store: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """`registry(name, delta, promoted=True)` registers a delta and promotes it; returns its version."""
    from app.config import PromoteConfig, StoreConfig, TrackingConfig
    from app.tracking.registry import promote, register
    from app.tracking.run import open_tracker, tracked_run

    def put(name: str, delta: Path, *, promoted: bool = True) -> int:
        output: Path = tmp_path_factory.mktemp("run")
        tracker = open_tracker(TrackingConfig(), output=str(output.parent))
        copy = Path(shutil.copytree(delta, output / "delta"))
        with tracked_run(tracker, name=name, output=output, settings={}, resume=False, warn=pytest.fail) as run:
            assert run is not None and run.keep(copy)
            version = int(register(run.client, run.run_id, name, delta_folder=copy, figures={}).rpartition("/")[2])
        if promoted:
            promote(PromoteConfig(name=name, version=version, tracking=StoreConfig(uri=tracking_store)))
        return version

    return put


@pytest.fixture(scope="session")
def damage(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Cuts off the end of a delta's weights, wherever they were put; `delta` itself stays."""

    def run(delta: Path) -> None:
        content = (delta / "delta.safetensors").read_bytes()
        copies = [
            file
            for file in tmp_path_factory.getbasetemp().rglob("delta.safetensors")
            if file.parent != delta
            and file.is_file()
            and file.stat().st_size == len(content)
            and file.read_bytes() == content
        ]
        assert copies
        for file in copies:
            file.write_bytes(content[:-8])

    return run


@pytest.fixture(scope="session")
def index_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of `DOCUMENTS` with an embedder that knows their words."""
    from app.retrieval.chunking import Document, chunk_document
    from app.retrieval.embedding import Embedder, embedder_hash
    from app.retrieval.folder import Manifest, write_index
    from app.retrieval.static_embedder import StaticEmbedderSettings, save_static_embedder, train_static_embedder

    embedder_dir = tmp_path_factory.mktemp("embedder")
    settings = StaticEmbedderSettings(vocab_size=300, width=64, epochs=0, lexical=1.0)
    texts = [*DOCUMENTS.values()] * 5
    save_static_embedder(embedder_dir, *train_static_embedder(texts, [], settings=settings, log=lambda line: None))

    embedder = Embedder(str(embedder_dir))
    documents = [Document(name, text) for name, text in DOCUMENTS.items()]
    chunks = [chunk for document in documents for chunk in chunk_document(document, chunk_words=30, overlap_words=5)]
    manifest = Manifest(
        embedder=str(embedder_dir), embedder_sha256=embedder_hash(embedder_dir), width=embedder.width,
        documents=len(documents), chunks=len(chunks), chunk_words=30, overlap_words=5,
    )  # fmt: skip
    vectors = embedder.embed([chunk.content for chunk in chunks])
    folder: Path = tmp_path_factory.mktemp("indexed") / "index"
    write_index(folder, documents=documents, chunks=chunks, vectors=vectors, manifest=manifest)
    return folder
