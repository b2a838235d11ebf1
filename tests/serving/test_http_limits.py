"""The application on a real Serve with tight limits: full queue, timeout, large bodies, clients that leave."""

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import httpx
import pytest
import torch

from app.config import ServeConfig, validate
from app.data.tokenization import save_tokenizer
from app.errors import UserError
from app.models.checkpoints import save_decoder
from app.models.decoder import Decoder, DecoderConfig
from app.serving.launch import serve_application, stop_application

pytestmark = pytest.mark.ray

REQUEST_TIMEOUT_S = 8.0
LONG = {"model": "pacos", "prompt": "An adult alpaca", "max_tokens": 8000, "temperature": 0}
SHORT = LONG | {"max_tokens": 5}


def another(body, number):
    """The same answer, which the cache does not know: no token turns on such a penalty."""
    return body | {"presence_penalty": number * 1e-6}


KEYS = [("ana", "key-of-ana", {}), ("ben", "key-of-ben", {"requests_per_minute": 3, "tokens_per_minute": 40})]
HEADERS = {"authorization": "Bearer key-of-ana"}


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture(scope="module")
def slow_model(tokenizer, tmp_path_factory):
    """Deep enough that LONG takes several times the timeout on any machine, and SHORT a small part of it."""
    torch.manual_seed(0)
    shape = DecoderConfig(tokenizer.vocab_size, context_length=8192, num_layers=24, num_heads=4, width=48, mlp_width=96)
    model = Decoder(shape)
    model.initialize()
    with torch.no_grad():
        model.token_embedding.weight[tokenizer.end_id] = 0  # its logit is always 0: no answer ends by itself
    folder = tmp_path_factory.mktemp("slow-model")
    save_decoder(folder, model)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def url(ray_cluster, slow_model, free_port):
    """Served by a Serve that ran, and held the port, before."""
    from ray import serve

    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": free_port})
    config = {
        "port": free_port,
        "generator": {"model": str(slow_model), "threads": 1, "max_batch_size": 2, "max_queue": 1},
        "request_timeout_s": REQUEST_TIMEOUT_S,
        "max_body_bytes": 5000,
        "access": {"keys": [{"name": name, "sha256": digest(key), **limits} for name, key, limits in KEYS]},
    }
    yield serve_application(validate(ServeConfig, config))
    stop_application()


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=60, trust_env=False, headers=HEADERS) as client:
        yield client
    wait_until_idle()


def stats():
    from ray import serve

    return serve.get_deployment_handle("generator", "pacos").stats.remote().result()["pacos"]


def wait_until(condition):
    """Until `stats` meet the condition."""
    deadline = time.monotonic() + 60
    while not condition(now := stats()):
        assert time.monotonic() < deadline, now
        time.sleep(0.02)


def wait_until_idle():
    """No request holds a place or a block of the KV cache."""
    wait_until(
        lambda now: (
            not now["running"] and not now["waiting"] and now["free_slots"] == 2 and now["free_blocks"] == now["blocks"]
        )
    )


def post_and_leave(url, body, *, after_s):
    with httpx.Client(base_url=url, trust_env=False, headers=HEADERS) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=after_s))


def test_a_client_that_leaves_ends_its_generation_and_nobody_elses(client, url):
    expected = client.post("/v1/completions", json=SHORT).json()["choices"]
    start = time.monotonic()
    leaver = threading.Thread(target=post_and_leave, args=(url, LONG), kwargs={"after_s": 1.0})
    leaver.start()
    while not stats()["running"] and leaver.is_alive():
        time.sleep(0.01)
    # While the other comes and goes, this one is answered as ever.
    for number in count(1):
        answer = client.post("/v1/completions", json=another(SHORT, number))
        assert answer.status_code == 200 and answer.json()["choices"] == expected
        if not leaver.is_alive():
            break
    wait_until_idle()
    assert time.monotonic() - start < REQUEST_TIMEOUT_S, "the timeout may have ended it"


def test_a_client_that_leaves_a_stream_ends_its_generation(client):
    start = time.monotonic()
    with client.stream("POST", "/v1/completions", json=another(LONG, 1) | {"stream": True}) as response:
        for _, line in zip(range(3), response.iter_lines(), strict=False):
            assert line == "" or line.startswith("data: ")
    wait_until_idle()
    assert time.monotonic() - start < REQUEST_TIMEOUT_S, "the timeout may have ended it"


def test_a_full_queue_answers_429_with_retry_after_and_serves_the_others(client):
    def stream(number):
        return client.stream("POST", "/v1/completions", json=another(LONG, number) | {"stream": True})

    with ThreadPoolExecutor(1) as pool:
        with stream(2), stream(3):  # an answer has begun in each of the two slots
            waiting = pool.submit(client.post, "/v1/completions", json=another(SHORT, 5001))
            wait_until(lambda now: now["waiting"] == 1)
            refused = client.post("/v1/completions", json=another(SHORT, 5002))
        assert waiting.result().status_code == 200
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1


def test_what_takes_too_long_is_a_504_or_a_streams_error_event_and_its_generation_ends(client):
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(client.post, "/v1/completions", json=LONG)
        with client.stream("POST", "/v1/completions", json=another(LONG, 4) | {"stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        answer = answering.result()
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert stream.status_code == 200
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    wait_until_idle()


def test_a_body_over_the_limit_is_a_413_declared_or_not(client):
    content = json.dumps(SHORT | {"prompt": "hay " * 2000}).encode()
    headers = {"content-type": "application/json"}
    declared = client.post("/v1/completions", content=content, headers=headers)
    chunked = client.post("/v1/completions", content=iter([content[:3000], content[3000:]]), headers=headers)
    for response in (declared, chunked):
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


def test_a_key_is_asked_for_and_its_limits_are_kept(client):
    def ask(**values):
        headers = {"authorization": "Bearer key-of-ben"}
        return client.post("/v1/completions", json=another(SHORT, 5003) | values, headers=headers)

    assert client.get("/v1/models", headers={"authorization": "Bearer of-nobody"}).status_code == 401
    assert client.get("/healthz", headers={"authorization": ""}).status_code == 200
    assert ask(max_tokens=40).status_code == 200
    deadline = time.monotonic() + 10
    while (refused := ask()).status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.1)  # what the first has cost is counted in the background
    assert refused.status_code == 429 and "tokens_per_minute=40" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert client.post("/v1/completions", json=SHORT).status_code == 200, "another key's is its own"


def test_without_an_index_rag_says_how_to_get_one(client):
    response = client.post("/v1/rag", json={"question": "Why?"})
    assert response.status_code == 404
    message = response.json()["error"]["message"]
    assert "pacos index" in message and "retriever.index" in message


def test_a_model_that_cannot_be_loaded_is_told_in_one_line(url, tmp_path, free_port, ray_cluster):
    from ray import serve

    from app.serving.application import build
    from app.serving.launch import _wait_until_running

    serve.delete("pacos")
    (tmp_path / "model").mkdir()
    application = build({"generator": {"model": str(tmp_path / "model")}})
    serve.run_many([serve.RunTarget(application, name="pacos", route_prefix="/")], wait_for_applications_running=False)
    with pytest.raises(UserError, match="did not start: .*tokenizer.json"):
        _wait_until_running(lambda states: None, 400)
