"""One cluster for all faults; each test leaves it whole."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.machine import describe
from tests.chaos.cluster import Cluster
from tests.chaos.cluster import cluster as started

REPOSITORY = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results.json"


@pytest.fixture(scope="session")
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture
def cluster(one_cluster: Cluster) -> Iterator[Cluster]:
    one_cluster.mend()
    yield one_cluster


@pytest.fixture(scope="session")
def model(one_cluster: Cluster, tiny_model: Path) -> Path:
    """`tiny_model` on the storage that all hosts share."""
    return Path(shutil.copytree(tiny_model, one_cluster.shared / "model"))


@pytest.fixture(scope="session")
def source(one_cluster: Cluster, small_source: Path) -> Path:
    return Path(shutil.copy(small_source, one_cluster.shared / "records.jsonl"))


@pytest.fixture(scope="session")
def data(one_cluster: Cluster, model: Path, source: Path) -> Path:
    """Prepared by a submitted job."""
    output = one_cluster.shared / "data"
    one_cluster.submit(
        "jobs/prepare_data.py", f"source={source}", f"output={output}", f"model={model}", "max_length=96",
        "records_per_shard=50", "validation_fraction=0.1",
    )  # fmt: skip
    return output


@pytest.fixture
def record(request: pytest.FixtureRequest, one_cluster: Cluster) -> Callable[..., None]:
    """`record(fault, seen, **figures)`: a row of the table, in place of this test's last one."""

    def write(fault: str, seen: str, **figures: object) -> None:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
        row = {"fault": fault, "seen": seen, **figures}
        results["rows"][request.node.name] = {key: round(v, 1) if isinstance(v, float) else v for key, v in row.items()}
        hosts = "namespaces" if one_cluster.head.in_namespaces else "addresses of the loopback device"
        results["machine"] = describe("ray", "torch") | {"hosts": hosts}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")

    return write


@pytest.fixture
def needs_namespaces(one_cluster: Cluster) -> None:
    if not one_cluster.head.in_namespaces:
        pytest.skip("links, disks and speeds of single hosts need namespaces, which are not allowed here")


@pytest.fixture(scope="session")
def many_records(one_cluster: Cluster) -> Path:
    """All example records, several times, each time others."""
    records = [json.loads(line) for line in (REPOSITORY / "examples/instructions.jsonl").open(encoding="utf-8")]
    file = one_cluster.shared / "many.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for copy in range(4):
            for record in records:
                stream.write(json.dumps(record | {"instruction": f"{record['instruction']} ({copy})"}) + "\n")
    return file
