"""The application in this process, without Ray: the same routes, over the same deployments' classes."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from app.config import ApplicationConfig
from app.serving.answering import Answering
from app.serving.documents import DocumentsDeployment
from app.serving.generator import GeneratorDeployment
from app.serving.ingress import create_api
from app.serving.retriever import RetrieverDeployment


class LocalHandle:
    """What Serve's handle of a deployment does, as far as the ingress uses it."""

    def __init__(self, deployment: Any, *, stream: bool = False, method_name: str = "") -> None:
        self._deployment, self._stream, self._method_name = deployment, stream, method_name

    def options(self, *, stream: bool = False, method_name: str = "") -> "LocalHandle":
        return LocalHandle(self._deployment, stream=stream, method_name=method_name)

    def __getattr__(self, name: str) -> "LocalHandle":
        return LocalHandle(self._deployment, stream=self._stream, method_name=name)

    def remote(self, *args: Any) -> Any:
        result = getattr(self._deployment, self._method_name)(*args)
        return LocalStream(result) if self._stream else LocalCall(result)


class LocalCall:
    """Begun at once where there is an event loop to run it; elsewhere by `result`."""

    def __init__(self, coroutine: Any) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._coroutine = coroutine
        else:
            self._task = asyncio.ensure_future(coroutine)

    def __await__(self) -> Any:
        return self._task.__await__()

    def result(self, *, timeout_s: float) -> Any:
        return asyncio.run(asyncio.wait_for(self._coroutine, timeout_s))

    def cancel(self) -> None:
        self._task.cancel()


class LocalStream:
    def __init__(self, items: Any) -> None:
        self._items = items

    def __aiter__(self) -> "LocalStream":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def cancel(self) -> None:
        self._task = asyncio.ensure_future(self._items.aclose())


@contextmanager
def served_here(config: ApplicationConfig) -> Iterator[str]:
    """Yields the URL."""
    generator = GeneratorDeployment(config)
    documents = None if config.retriever.documents is None else LocalHandle(DocumentsDeployment(config.retriever))
    answering = Answering(
        config,
        generator=LocalHandle(generator),
        retriever=LocalHandle(RetrieverDeployment(config.retriever, documents)),
        documents=documents,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_api(answering), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
        yield url
    finally:
        server.should_exit = True
        thread.join(30)
        generator.__del__()
