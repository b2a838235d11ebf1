"""Documents that are uploaded without end, each until it is kept."""

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import httpx

from tests.chaos.traffic import CONNECT_WITHIN_S, WAIT_S


@dataclass
class Upload:
    """One document, and what each try of it met: a status, or the name of what broke the connection."""

    name: str
    text: str
    met: list[int | str] = field(default_factory=list)
    began: float = 0.0
    """Its last try."""

    @property
    def is_kept(self) -> bool:
        """Or was by an earlier try, which broke after the change was made."""
        return self.met[-1] == 201 or (self.met[-1] == 409 and len(self.met) > 1)

    @property
    def num_broken(self) -> int:
        return len(self.met) - self.is_kept


class Uploads:
    """Within the block, `clients` upload one document after the other, at the nodes in turn."""

    def __init__(self, urls: Sequence[str], *, clients: int = 3) -> None:
        self.kept: list[Upload] = []
        """Those whose client was told so, in that order."""
        self._urls, self._turn, self._numbers = list(urls), itertools.count(), itertools.count()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._upload_on, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S + CONNECT_WITHIN_S + 10)
            assert not thread.is_alive(), "an upload was left without an answer"

    def go_on(self, seconds: float) -> None:
        time.sleep(seconds)

    def begun_since(self, moment: float) -> list[Upload]:
        """Those kept whose last try began later."""
        return [upload for upload in list(self.kept) if upload.began > moment]

    def _upload_on(self) -> None:
        timeout = httpx.Timeout(WAIT_S, connect=CONNECT_WITHIN_S)
        with httpx.Client(timeout=timeout, trust_env=False) as client:
            while not self._stop.is_set():
                number = next(self._numbers)
                text = f"Upload {number}. " + "An adult alpaca eats two kilograms of hay each day. " * 10
                upload = Upload(f"upload-{number}.txt", text)
                self._try_on(upload, client)
                if upload.met and upload.is_kept:
                    self.kept.append(upload)

    def _try_on(self, upload: Upload, client: httpx.Client) -> None:
        while not self._stop.is_set():
            url = self._urls[next(self._turn) % len(self._urls)]
            upload.began = time.monotonic()
            try:
                body = {"name": upload.name, "text": upload.text}
                upload.met.append(client.post(f"{url}/v1/documents", json=body).status_code)
            except httpx.TransportError as error:
                upload.met.append(type(error).__name__)
            if upload.is_kept:
                return
            self._stop.wait(0.2)
