"""`pacos serve` as a process of its own, for the tests that end it."""

import os
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.serving.load import until


@contextmanager
def pacos_serve(
    settings: Sequence[str], folder: Path, *, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """In `folder`, with `environment` beside this process' own; not yet up. What it has said is printed at the end."""
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | dict(environment or {})
    variables.pop("RAY_ADDRESS", None)
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve", *settings],
            env=variables, cwd=folder, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        yield process
        process.kill()
        process.wait()
    print((folder / "output").read_text())


@contextmanager
def client_of(process: subprocess.Popen, port: int, *, authority: str | None = None) -> Iterator[httpx.Client]:
    """Once it answers; by HTTPS where the file of an authority is given."""
    scheme, verify = ("http", True) if authority is None else ("https", ssl.create_default_context(cafile=authority))
    url = f"{scheme}://127.0.0.1:{port}"
    with httpx.Client(base_url=url, verify=verify, timeout=60, trust_env=False) as client:

        def answers() -> bool:
            assert process.poll() is None, "it has ended"
            try:
                return client.get("/healthz").status_code == 200
            except httpx.TransportError:
                return False

        until(answers, within_s=400)
        yield client
