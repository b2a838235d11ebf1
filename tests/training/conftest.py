"""A server that speaks S3, for checkpoints."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest


class S3Server:
    def __init__(self, moto: Any) -> None:
        self._moto = moto
        self._server: Any = None
        self.port = 0
        self.start()
        httpx.put(f"http://127.0.0.1:{self.port}/bucket").raise_for_status()

    def start(self) -> None:
        """On the port that it had before, with the content that it had."""
        self._server = self._moto.ThreadedMotoServer("127.0.0.1", port=self.port)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()

    def uri(self, folder: str) -> str:
        # allow_delayed_open: of an upload in parts moto 5.2 answers what pyarrow takes for an error
        query = f"scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1&allow_delayed_open=true"
        return f"s3://key:secret@bucket/{folder}?{query}"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    server = S3Server(pytest.importorskip("moto.server", reason="moto, which serves S3, is not installed"))
    yield server
    server.stop()
