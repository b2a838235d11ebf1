"""A real Prometheus over a running cluster, with the rules and the scrape job that we ship."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.local_cluster import free_port
from tests.serving.load import until

ALERTS = Path(__file__).parents[2] / "cluster/monitoring/alerts.yaml"


class Prometheus:
    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def get(self, path: str, **parameters: str) -> Any:
        response = self._client.get(f"/api/v1/{path}", params=parameters)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def values(self, promql: str) -> list[float]:
        """Of each series, now."""
        return [float(series["value"][1]) for series in self.get("query", query=promql)["result"]]


@contextmanager
def prometheus(folder: Path, targets: Path) -> Iterator[Prometheus]:
    """One that scrapes what Ray's discovery file `targets` names, and keeps its data in `folder`."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not on PATH; Debian's package is called prometheus")
    config = {
        # Beside other tests, Ray takes up to two seconds to answer; a scrape that fails makes all its gauges stale.
        "global": {"scrape_interval": "3s", "scrape_timeout": "3s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(targets)]}]}],
    }
    file, port = folder / "prometheus.yaml", free_port()
    file.write_text(yaml.safe_dump(config))
    command = [
        program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            until(lambda: _is_ready(client, process), within_s=60)
            yield Prometheus(client)
    finally:
        process.kill()
        process.wait()
        print((folder / "log").read_text())


def _is_ready(client: httpx.Client, process: subprocess.Popen) -> bool:
    assert process.poll() is None, "Prometheus has ended"
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
