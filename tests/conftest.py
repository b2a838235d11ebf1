"""Fixtures that several packages' tests share. One Ray cluster serves the whole session of pytest."""

import contextlib
import functools
import json
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Beside other processes of this suite, two threads of one wait for each other longer than they compute. OpenMP reads
# this once, when torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_worker_niceness", "0")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("pacos", deadline=None)  # other processes may hold the cores
hypothesis.settings.load_profile("pacos")

REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--api-examples", type=int, help="of tests/serving/test_api_schema.py: requests a route")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest goes first: no process is left with it while the others are done."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()) and not _shares_ray(item.path):
            raise pytest.UsageError(f"{item.nodeid} uses the shared Ray cluster; mark it `ray`, else there is another")
    own_ray, slow = ({item.path for item in items if item.get_closest_marker(marker)} for marker in ("own_ray", "slow"))
    items.sort(key=lambda item: (not _shares_ray(item.path), item.path not in own_ray, item.path not in slow))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes one has all files that share a Ray cluster; the others have what is left."""
    from xdist.scheduler import LoadFileScheduling

    class OneProcessForRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ray" if _shares_ray(config.rootpath / file) else file

    return OneProcessForRay(config, log)


@functools.cache
def _shares_ray(file: Path) -> bool:
    return "pytest.mark.ray" in file.read_text(encoding="utf-8")


@pytest.fixture(scope="session", autouse=True)
def tracking_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One MLflow for all jobs that name none: making its SQLite file takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    yield uri
    os.environ.pop("MLFLOW_TRACKING_URI")
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster of six logical CPUs. A replica that cannot start there is not started again."""
    from app.ray_cluster import connected

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:  # which its processes keep, and no other cluster gets
            environment.setenv("RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT", "1")
            stack.enter_context(connected(None, min_cpus=6))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real third-party data, where it lies beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the third-party test data is not on this machine")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights and a tokenizer of 400 entries: GPT-2's layout in small."""
    from app.data.tokenization import save_tokenizer, train_tokenizer
    from app.models.checkpoints import save_decoder
    from app.models.decoder import Decoder, DecoderConfig

    folder = tmp_path_factory.mktemp("tiny-model")
    records = [json.loads(line) for line in (REPOSITORY / "examples/instructions.jsonl").open(encoding="utf-8")]
    tokenizer = train_tokenizer([record["output"] for record in records[:300]], vocab_size=400)
    config = DecoderConfig(tokenizer.vocab_size, context_length=96, num_layers=2, num_heads=2, width=32, mlp_width=64)
    model = Decoder(config)
    model.initialize(generator=torch.Generator().manual_seed(0))
    save_decoder(folder, model)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def free_port() -> int:
    """Below those that the system gives to whoever connects: nobody has it where a test comes to listen there."""
    for port in random.Random().sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    pytest.fail("a hundred ports from 20,000 to 29,999 are taken")


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A real Redis server of the test's own, and its URL."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not on PATH")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield server, f"redis://127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def redis_url(redis_server: tuple[subprocess.Popen, str]) -> str:
    return redis_server[1]


def _wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")


@pytest.fixture(scope="session")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 200 example records, as JSON Lines."""
    file = tmp_path_factory.mktemp("source") / "records.jsonl"
    lines = (REPOSITORY / "examples/instructions.jsonl").read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(lines[:200]) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def small_data(
    ray_cluster: None, tiny_model: Path, small_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`small_source`, prepared for `tiny_model`."""
    from app.config import PrepareConfig
    from app.data.prepare import prepare

    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(
        PrepareConfig(
            source=str(small_source),
            output=str(output),
            model=str(tiny_model),
            max_length=96,
            validation_fraction=0.1,
            records_per_shard=60,
        )
    )
    return output


@pytest.fixture(scope="session")
def tiny_shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data for `tiny_model`, made without Ray: documents whose tokens rise by one."""
    import numpy as np

    from app.config import PrepareConfig
    from app.data.encoding import Tokens
    from app.data.prompts import PacosTemplate
    from app.data.shards import FORMAT, MANIFEST, write_shard
    from app.data.tokenization import load_tokenizer

    folder = tmp_path_factory.mktemp("tiny-shards")
    draw = np.random.default_rng(0)

    def document() -> list[Tokens]:
        length = int(draw.integers(6, 24))
        ids = (int(draw.integers(300)) + np.arange(length)) % 300
        return [Tokens(ids.tolist(), [(2, False), (length - 2, True)])]

    shards = []
    for split, count in (("train", 64), ("validation", 12), ("test", 12)):
        (folder / split).mkdir()
        shards.append(write_shard(folder, split, index=0, rows=[document() for _ in range(count)]))
    tokenizer = load_tokenizer(tiny_model)
    config = PrepareConfig(source=("records.jsonl",), output=str(folder), model=str(tiny_model), max_length=24)
    manifest = {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "tokenizer_hash": tokenizer.fingerprint(),
        "template": PacosTemplate().to_json(),
        "splits": {shard["split"]: shard for shard in shards},
        "shards": shards,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder
