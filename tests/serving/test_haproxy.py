"""`pacos serve proxy=haproxy`: nothing but HAProxy between a client and the ingress, and the same service."""

import signal
import socket
import time

import openai
import pytest

from tests.serving.load import until
from tests.serving.served_process import client_of, pacos_serve

pytestmark = [pytest.mark.own_ray, pytest.mark.chaos]

LONG = {"model": "pacos", "prompt": "An adult alpaca", "max_tokens": 1900, "temperature": 1.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def process(model_dir, free_port, tmp_path_factory):
    settings = [
        f"port={free_port}", "proxy=haproxy", f"generator.model={model_dir}", "generator.threads=1",
        "generator.max_batch_size=1", "generator.max_queue=1", "max_body_bytes=10000",
    ]  # fmt: skip
    with pacos_serve(settings, tmp_path_factory.mktemp("haproxy")) as process:
        yield process


@pytest.fixture(scope="module")
def client(process, free_port):
    with client_of(process, free_port) as client:
        yield client


def seconds_until_answered(client, body):
    began = time.monotonic()
    until(lambda: client.post("/v1/completions", json=body).status_code == 200)
    return time.monotonic() - began


def test_openais_client_streams_and_gets_its_errors(client, free_port):
    asking = openai.OpenAI(base_url=f"http://127.0.0.1:{free_port}/v1", api_key="none", max_retries=0)
    asked = {"model": "pacos", "prompt": "An adult alpaca", "max_tokens": 20, "temperature": 0}
    whole = asking.completions.create(**asked)
    chunks = list(asking.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 20
    with pytest.raises(openai.NotFoundError, match="no-such"):
        asking.completions.create(**asked | {"model": "no-such"})
    large = client.post("/v1/completions", json={"model": "pacos", "prompt": "x" * 20_000})
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
    assert client.get("/healthz", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


def test_tokens_come_one_after_the_other_and_not_all_at_the_end(client):
    with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        arrived = [time.monotonic() for line in response.iter_lines() if line]
    assert len(arrived) > 10 and arrived[-1] - arrived[0] > 5 * (arrived[1] - arrived[0])


def test_a_client_that_leaves_frees_its_place(client):
    """There is one place, and one to wait at; the answer that it had would take the other requests' patience."""
    short = {"model": "pacos", "prompt": "An adult alpaca", "max_tokens": 2, "temperature": 1.0}
    began = time.monotonic()
    assert client.post("/v1/completions", json=LONG).status_code == 200
    whole_s = time.monotonic() - began
    with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        next(response.iter_lines())
    assert seconds_until_answered(client, short) < whole_s / 2


def test_what_was_accepted_is_finished_and_nothing_of_it_stays(client, process, free_port):
    with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/healthz").status_code == 503, within_s=30)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(120) == 0
    with socket.create_server(("127.0.0.1", free_port)):  # HAProxy has gone too
        pass
