import asyncio
import logging

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from app.serving.api_errors import ApiError, add_error_handlers
from app.serving.messages import Refusal
from app.serving.request_log import LogRequests, note, note_key


@pytest.fixture
def client(caplog):
    caplog.set_level(logging.INFO, logger="ray.serve")
    api = FastAPI()
    add_error_handlers(api)
    api.add_middleware(LogRequests)

    @api.get("/answers/{name}")
    async def answer(name: str):
        note(model="pacos", cache="miss", prompt_tokens=3)
        note_key("0123456789abcdef" * 4)

        async def pieces():
            for number in range(3):
                note(completion_tokens=number + 1)
                yield "piece"

        return StreamingResponse(pieces())

    @api.get("/refused")
    async def refused():
        raise ApiError(Refusal(429, "too many", code="queue_full", retry_after_s=1))

    @api.get("/broken")
    async def broken():
        raise RuntimeError("broken")

    @api.get("/slow")
    async def slow():
        await asyncio.sleep(60)

    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def logged(caplog):
    (record,) = [record for record in caplog.records if hasattr(record, "latency_ms")]
    return record


def test_a_request_is_one_line_with_what_was_noted(client, caplog):
    asyncio.run(client.get("/answers/secret-question?q=another-secret"))
    record = logged(caplog)
    assert (record.method, record.path, record.status) == ("GET", "/answers/{name}", 200)
    assert (record.model, record.cache, record.prompt_tokens, record.completion_tokens) == ("pacos", "miss", 3, 3)
    assert record.key == "0123456789ab" and record.error is None
    assert 0 < record.first_byte_ms <= record.latency_ms
    assert record.getMessage().startswith("GET /answers/{name} 200 ") and "prompt_tokens=3" in record.getMessage()
    assert "secret" not in str(vars(record))


@pytest.mark.parametrize(
    ("path", "status", "route", "error"),
    [
        ("/refused", 429, "/refused", "queue_full"),
        ("/broken", 500, "/broken", "internal_error"),
        ("/no%0Asuch", 404, None, "not_found"),
    ],
)
def test_what_failed_says_why(client, caplog, path, status, route, error):
    assert asyncio.run(client.get(path)).status_code == status
    record = logged(caplog)
    assert (record.status, record.path, record.error) == (status, route, error)
    assert "\n" not in record.getMessage()


def test_a_client_that_leaves_is_told_as_such(client, caplog):
    async def leave():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.get("/slow"), 0.1)

    asyncio.run(leave())
    assert logged(caplog).status == 499


def test_requests_at_the_same_time_note_apart(client, caplog):
    async def both():
        await asyncio.gather(client.get("/answers/a"), client.get("/refused"))

    asyncio.run(both())
    models = {record.path: record.model for record in caplog.records if hasattr(record, "latency_ms")}
    assert models == {"/answers/{name}": "pacos", "/refused": None}
