"""Who may ask: API keys, of which the server knows only hashes, and the middleware that asks for one."""

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import yaml
from starlette.types import ASGIApp, Receive, Scope, Send

from app.atomic import write_text
from app.config import AccessConfig, ApiKeyConfig, KeyConfig, validate
from app.errors import UserError
from app.serving.api_errors import refuse
from app.serving.limiter import LimiterClient
from app.serving.messages import Refusal
from app.serving.request_log import note_key

logger = logging.getLogger("ray.serve")

ENVIRONMENT = "PACOS_API_KEYS"
OPEN_PATHS = frozenset({"/", "/healthz", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
"""What anyone may see: nothing on them computes or tells anything of a user."""
_PREFIX = "pacos-"
_LOOK_EVERY_S = 1.0

current_key: ContextVar[ApiKeyConfig | None] = ContextVar("current_key", default=None)
"""Whose request this is."""


def new_key(config: KeyConfig) -> str:
    """Make a key and add its entry to the file; returns the key, which cannot be had again.

    Raises:
        UserError: the name is taken, or the file is not one of keys or cannot be written.
    """
    file = Path(config.keys_file)
    entries = list(read_keys(file)) if file.exists() else []
    if any(entry.name == config.name for entry in entries):
        raise UserError(f"name={config.name!r} has a key in {config.keys_file!r} already; remove its entry first")
    key = _PREFIX + secrets.token_urlsafe(32)
    entries.append(ApiKeyConfig(sha256=_hash(key), **config.model_dump(exclude={"keys_file"})))
    values = [entry.model_dump(exclude_none=True) for entry in entries]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(values, sort_keys=False))
    return key


def read_keys(file: Path) -> tuple[ApiKeyConfig, ...]:
    """
    Raises:
        UserError: the file cannot be read, or is not what `new_key` writes.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"access.keys_file={str(file)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"access.keys_file={str(file)!r} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return validate(AccessConfig, {"keys": values or []}).keys
    except UserError as error:
        raise UserError(f"access.keys_file={str(file)!r}: {error}") from None


def keys_of_environment(environment: Mapping[str, str] = os.environ) -> tuple[ApiKeyConfig, ...]:
    """
    Raises:
        UserError: PACOS_API_KEYS is not `NAME:SHA256,…`.
    """
    entries = [entry.strip().rpartition(":") for entry in environment.get(ENVIRONMENT, "").split(",") if entry.strip()]
    try:
        values = [{"name": name, "sha256": digest} for name, _, digest in entries]
        return validate(AccessConfig, {"keys": values}).keys
    except UserError:
        raise UserError(
            f"{ENVIRONMENT} must hold NAME:SHA256,NAME:SHA256, the hashes of keys, each of 64 hexadecimal digits"
        ) from None


class KeyRing:
    """The keys there are; `find` takes as long for a wrong one as for a right one."""

    def __init__(self, config: AccessConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Raises:
            UserError: as `read_keys`.
        """
        self._fixed = config.keys
        self._file = None if config.keys_file is None else Path(config.keys_file)
        self._clock = clock
        self._read: tuple[ApiKeyConfig, ...] = ()
        self._state: Any = None
        self._look_at = 0.0
        if self._file is not None:
            self._state = self._file_state()
            self._read = read_keys(self._file)

    def find(self, presented: str) -> ApiKeyConfig | None:
        self._look_again()
        digest, found = _hash(presented), None
        for key in (*self._fixed, *self._read):
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _look_again(self) -> None:
        if self._file is None or self._clock() < self._look_at:
            return
        self._look_at = self._clock() + _LOOK_EVERY_S
        state = self._file_state()
        if state == self._state:
            return
        self._state = state
        try:
            self._read = read_keys(self._file)
        except UserError as error:  # nobody who may ask is shut out by someone's slip
            logger.error(f"the keys stay as they were: {error}")

    def _file_state(self) -> Any:
        assert self._file is not None
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


class RequireKey:
    """ASGI middleware: who shows no key gets a 401, who has used up a limit a 429."""

    def __init__(self, app: ASGIApp, *, ring: KeyRing, limiter: LimiterClient) -> None:
        self.app = app
        self._ring = ring
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self.app(scope, receive, send)
        key = self._ring.find(presented) if (presented := _bearer(scope["headers"])) else None
        if key is None:
            return await refuse(_unknown(presented))(scope, receive, send)
        note_key(key.sha256)
        if refusal := await self._limiter.admit(key):
            return await refuse(refusal)(scope, receive, send)
        token = current_key.set(key)
        try:
            await self.app(scope, receive, send)
        finally:
            current_key.reset(token)


def _bearer(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip().decode("latin-1")
    return None


def _unknown(presented: str | None) -> Refusal:
    said = "this API key is not known" if presented else "send an API key: Authorization: Bearer KEY"
    return Refusal(401, said, code="invalid_api_key")


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
