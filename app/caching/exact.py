"""Answers found again by the hash of everything that shapes them. Knows no models and no HTTP."""

import hashlib
import json
import logging
from typing import Any

from app.caching.backends import Backend, BackendUnavailable

log = logging.getLogger(__name__)


def cache_key(model_hash: str, **fields: Any) -> str:
    """SHA-256 over the model and all that shapes its answer.

    `model_hash` is the content hash of the weights (base, and delta if there is one), not a name: a retrained model
    answers under new keys. `fields` are JSON values: the prompt as rendered, every sampling parameter, and for an
    answer that draws on documents the passages themselves. What is left out of the key is shared between requests
    that differ in it.
    """
    content = {"format": 1, "model": model_hash, "request": fields}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


class ResponseCache:
    """JSON objects by key for `ttl_s` seconds. It fails open: a backend that is away means a miss, never an error."""

    def __init__(self, backend: Backend, ttl_s: float) -> None:
        self.errors = 0
        """Lookups and writes that the backend could not serve."""
        self.is_out = False
        """Whether the last of them was one."""
        self._backend = backend
        self._ttl_s = ttl_s

    @property
    def num_bytes(self) -> int:
        """What this process' memory holds."""
        return self._backend.num_bytes

    async def get(self, key: str) -> dict[str, Any] | None:
        return _parse(await self._try_get(key))

    async def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep `value`, or lose it if the backend is away.

        Raises:
            TypeError: `value` holds something that JSON does not know.
        """
        text = json.dumps(value)
        try:
            await self._backend.put(key, text, ttl_s=self._ttl_s)
        except BackendUnavailable as error:
            self._note_outage(error)
        else:
            self._note_success()

    async def close(self) -> None:
        await self._backend.close()

    async def _try_get(self, key: str) -> str | None:
        try:
            text = await self._backend.get(key)
        except BackendUnavailable as error:
            self._note_outage(error)
            return None
        self._note_success()
        return text

    def _note_outage(self, error: BackendUnavailable) -> None:
        self.errors += 1
        if not self.is_out:  # once per outage, not once per request
            log.warning("response cache: %s; answers are computed anew until it is back", error)
        self.is_out = True

    def _note_success(self) -> None:
        if self.is_out:
            log.warning("response cache: back after %d failed operations in all", self.errors)
        self.is_out = False


def _parse(text: str | None) -> dict[str, Any] | None:
    """The object in `text`; None for anything else, which a shared server may hold under our key."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
