"""API keys and limits: the file, the middleware, the counts."""

import asyncio
import hashlib
import json
import re
import stat
from types import SimpleNamespace

import pytest
import yaml
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from app.assets import EMBEDDED_BASE
from app.config import AccessConfig, ApiKeyConfig, ApplicationConfig, KeyConfig, validate
from app.errors import UserError
from app.serving.access import KeyRing, RequireKey, current_key, keys_of_environment, new_key, read_keys
from app.serving.answering import Answering
from app.serving.application import build
from app.serving.ingress import create_api
from app.serving.limiter import LimiterClient, Limits


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_new_key_opens_and_stands_nowhere(tmp_path):
    file = tmp_path / "deep" / "keys.yaml"
    first = new_key(KeyConfig(name="ana", keys_file=str(file)))
    second = new_key(KeyConfig(name="ben", keys_file=str(file), requests_per_minute=60))
    text = file.read_text()
    assert first not in text and second not in text and len(first) > 40
    ring = KeyRing(AccessConfig(keys_file=str(file)))
    assert ring.find(first).name == "ana" and ring.find(second).requests_per_minute == 60
    assert ring.find(first[:-1]) is None and ring.find("") is None
    with pytest.raises(UserError, match="'ana' has a key in .* already"):
        new_key(KeyConfig(name="ana", keys_file=str(file)))
    assert file.read_text() == text


def test_a_changed_file_counts_at_once_and_a_broken_one_locks_nobody_out(tmp_path, caplog):
    file, clock = tmp_path / "keys.yaml", Clock()
    first = new_key(KeyConfig(name="ana", keys_file=str(file)))
    ring = KeyRing(AccessConfig(keys_file=str(file)), clock=clock)
    second = new_key(KeyConfig(name="ben", keys_file=str(file)))
    clock.now += 2
    assert ring.find(second)
    file.write_text("- name: [")
    clock.now += 2
    assert ring.find(first) and "the keys stay as they were" in caplog.text
    file.write_text(yaml.safe_dump([{"name": "ben", "sha256": digest(second)}]))
    clock.now += 2
    assert ring.find(first) is None and ring.find(second)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- {name: a}", "keys.0.sha256"),
        ("- {name: a, sha256: plain}", "keys.0.sha256"),
        (f"- {{name: a, sha256: {digest('x')}, limit: 3}}", "limit"),
        ("{", "not YAML"),
        (f"- {{name: 'a b', sha256: {digest('x')}}}", "keys.0.name"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, text, told):
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"keys.yaml.*{told}"):
        read_keys(file)
    with pytest.raises(UserError, match="keys.yaml"):
        build({"access": {"keys_file": str(file)}})


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match="keys_file=.*No such file"):
        KeyRing(AccessConfig(keys_file=str(tmp_path / "none.yaml")))


def test_keys_of_the_environment_are_hashes_too():
    keys = keys_of_environment({"PACOS_API_KEYS": f"ana:{digest('one')}, ben:{digest('two')}"})
    assert [key.name for key in keys] == ["ana", "ben"]
    assert KeyRing(AccessConfig(keys=keys)).find("two").name == "ben"
    assert keys_of_environment({}) == ()
    for wrong in ("secret", "ana:secret", f"ana={digest('x')}"):
        with pytest.raises(UserError, match="PACOS_API_KEYS must hold NAME:SHA256") as error:
            keys_of_environment({"PACOS_API_KEYS": wrong})
        assert "secret" not in str(error.value), "it may be a key"


class Handle:
    """Of a deployment that answers, fails, or hangs."""

    def __init__(self) -> None:
        self.limits, self.calls, self.mode = Limits(), 0, "answers"

    def options(self, *, method_name: str):
        return type("Method", (), {"remote": lambda _, *args: self.call(method_name, *args)})()

    async def call(self, method: str, *args):
        self.calls += 1
        if self.mode == "fails":
            raise RuntimeError("gone")
        if self.mode == "hangs":
            await asyncio.sleep(60)
        return getattr(self.limits, method)(*args)


@pytest.fixture
def client():
    async def who(request):
        key = current_key.get()
        return PlainTextResponse(key.name if key else "anyone")

    keys = (
        ApiKeyConfig(name="ana", sha256=digest("one")),
        ApiKeyConfig(name="ben", sha256=digest("two"), requests_per_minute=2),
    )
    api = Starlette(routes=[Route("/", who), Route("/v1/models", who), Route("/healthz", who)])
    api.add_middleware(RequireKey, ring=KeyRing(AccessConfig(keys=keys)), limiter=LimiterClient(Handle()))
    with TestClient(api) as client:
        yield client


@pytest.mark.parametrize("header", [None, "one", "Basic one", "Bearer", "Bearer three", "Bearer one two"])
def test_without_a_right_key_nothing_is_answered(client, header):
    response = client.get("/v1/models", headers={} if header is None else {"authorization": header})
    assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "three" not in json.dumps(response.json())


def test_without_a_key_every_route_but_the_open_ones_is_closed():
    config = validate(ApplicationConfig, {"generator": {"model": str(EMBEDDED_BASE)}})
    handle = SimpleNamespace(options=lambda **_: None)
    api = create_api(Answering(config, generator=handle, retriever=handle))
    ring = KeyRing(AccessConfig(keys=(ApiKeyConfig(name="ana", sha256=digest("one")),)))
    api.add_middleware(RequireKey, ring=ring, limiter=LimiterClient(Handle()))
    asked = {(method, route.path) for route in api.routes for method in route.methods - {"HEAD"}}
    client = TestClient(api, raise_server_exceptions=False)
    status = {(method, path): client.request(method, re.sub(r"{\w+}", "x", path)).status_code for method, path in asked}
    is_open = {path for (_, path), code in status.items() if code != 401}
    assert is_open == {"/", "/healthz", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
    assert {"/v1/completions", "/v1/documents", "/v1/documents/{id}/content"} <= {path for _, path in asked} - is_open
    assert all(client.get(path).status_code == 200 for path in is_open - {"/healthz"})


def test_with_a_key_the_request_knows_whose_it_is(client):
    assert client.get("/v1/models", headers={"authorization": "bearer one"}).text == "ana"
    assert client.get("/healthz").text == client.get("/").text == "anyone"


def test_a_used_up_limit_is_a_429_with_the_time_until_there_is_room(client):
    def ask():
        return client.get("/v1/models", headers={"authorization": "Bearer two"})

    assert [ask().status_code for _ in range(2)] == [200, 200]
    refused = ask()
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 25 <= int(refused.headers["retry-after"]) <= 30, "two a minute: one every 30 seconds"
    assert client.get("/v1/models", headers={"authorization": "Bearer one"}).status_code == 200


def test_allowances_fill_up_evenly_and_tokens_are_paid_afterwards():
    clock = Clock()
    limits = Limits(clock=clock)
    key = ApiKeyConfig(name="ana", sha256=digest("x"), tokens_per_minute=600)
    assert limits.admit(key) is None
    limits.charge(key, 1000)
    limit, wait_s = limits.admit(key)
    assert limit == "tokens_per_minute" and wait_s == pytest.approx(40.1)
    clock.now += 40
    assert limits.admit(key) is not None
    clock.now += 0.2
    assert limits.admit(key) is None
    clock.now += 3600
    limits.charge(key, 600)
    assert limits.admit(key) is not None, "an hour of silence saves up no more than a minute's allowance"


@pytest.mark.parametrize("mode", ["fails", "hangs"])
def test_a_limiter_that_does_not_answer_is_replaced_by_a_count_of_ones_own(mode):
    handle, clock = Handle(), Clock()
    client = LimiterClient(handle, deadline_s=0.05, pause_s=5, clock=clock)
    key = ApiKeyConfig(name="ana", sha256=digest("x"), requests_per_minute=2)

    async def admit(times: int) -> list[bool]:
        return [await client.admit(key) is None for _ in range(times)]

    handle.mode = mode
    assert asyncio.run(admit(3)) == [True, True, False] and handle.calls == 1
    handle.mode = "answers"
    clock.now += 6
    assert asyncio.run(admit(1)) == [True] and handle.calls == 2


def test_a_key_without_limits_asks_no_limiter():
    handle = Handle()
    client = LimiterClient(handle)
    assert asyncio.run(client.admit(ApiKeyConfig(name="ana", sha256=digest("x")))) is None
    assert handle.calls == 0


def test_the_file_of_keys_keeps_the_rights_that_it_was_given(tmp_path):
    file = tmp_path / "keys.yaml"
    new_key(KeyConfig(name="ana", keys_file=str(file)))
    file.chmod(0o600)
    new_key(KeyConfig(name="ben", keys_file=str(file)))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(read_keys(file)) == 2
