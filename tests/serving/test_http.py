"""The application on a real Serve, asked over HTTP."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from app.config import AskConfig, ServeConfig, validate
from app.errors import UserError
from app.serving.ask import ask
from app.serving.launch import serve_application, stop_application

pytestmark = pytest.mark.ray

PROMPT = "An adult alpaca"


@pytest.fixture(scope="module")
def url(ray_cluster, model_dir, delta_dir, index_dir, free_port):
    config = {
        "port": free_port,
        "generator": {
            "model": str(model_dir), "deltas": {"tuned": str(delta_dir)}, "threads": 1, "max_batch_size": 8,
        },
        "retriever": {"index": str(index_dir), "top_k": 2},
    }  # fmt: skip
    states = []
    yield serve_application(validate(ServeConfig, config), progress=states.append)
    assert set(states[-1].values()) == {"HEALTHY"} and set(states[-1]) == {"ingress", "generator", "retriever", "cache"}
    stop_application()


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


def complete(client, **values):
    body = {"model": "pacos", "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | values
    return client.post("/v1/completions", json=body)


def stream(client, **values):
    """(events before [DONE], whether [DONE] came, headers)."""
    body = {"model": "pacos", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True} | values
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    done = data[-1] == "[DONE]"
    return [json.loads(item) for item in data if item != "[DONE]"], done, response.headers


def test_a_greedy_completion_is_the_continuation_that_transformers_gives(client, greedy, tokenizer):
    response = complete(client, max_tokens=20)
    assert response.status_code == 200
    answer = response.json()
    num_prompt = len(tokenizer.encode(PROMPT))
    assert answer["object"] == "text_completion" and answer["model"] == "pacos"
    assert answer["choices"] == [{"index": 0, "text": greedy(PROMPT, 20), "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {
        "prompt_tokens": num_prompt, "completion_tokens": 20, "total_tokens": num_prompt + 20
    }  # fmt: skip


def test_token_ids_and_lists_are_prompts_too(client, greedy, tokenizer):
    ids = [tokenizer.encode(text) for text in (PROMPT, "foxes")]
    assert complete(client, prompt=ids[0]).json()["choices"][0]["text"] == greedy(PROMPT, 12)
    expected = [greedy(PROMPT, 12), greedy("foxes", 12)]
    for prompt in ([PROMPT, "foxes"], ids):
        assert [choice["text"] for choice in complete(client, prompt=prompt).json()["choices"]] == expected


def test_streamed_text_equals_unstreamed_text(client, greedy):
    # sampled with a seed, of which the stream is not in the cache: it asks for usage, the other has no such key
    for values in ({"max_tokens": 40, "temperature": 0}, {"max_tokens": 40, "temperature": 1.2, "seed": 4}):
        events, done, headers = stream(client, **values, stream_options={"include_usage": True})
        assert done and headers["x-pacos-cache"] == "miss"
        *chunks, last = events
        assert len(chunks) > 5, "a stream in one piece is no stream"
        whole = complete(client, **values).json()
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        assert len({event["id"] for event in events}) == 1


def test_concurrent_requests_get_the_answers_that_each_gets_alone(client, greedy):
    prompts = [PROMPT, "Shearing takes", "foxes and", "hay", "a stray dog", "The", "winter", "llamas will guard"] * 2
    with ThreadPoolExecutor(len(prompts)) as pool:
        texts = list(pool.map(lambda p: complete(client, prompt=p).json()["choices"][0]["text"], prompts))
    assert texts == [greedy(prompt, 12) for prompt in prompts]


def test_a_stop_string_ends_the_answer(client, greedy):
    text = greedy(PROMPT, 30)
    stop = text[10:13]
    choice = complete(client, max_tokens=30, stop=stop).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_the_same_seed_gives_the_same_answer_and_unseeded_answers_are_not_cached(client):
    def text(**values):
        response = complete(client, temperature=1.3, max_tokens=20, **values)
        return response.json()["choices"][0]["text"], response.headers["x-pacos-cache"]

    first, second = text(seed=1, user="a"), text(seed=1, user="b")
    assert first[0] == second[0]
    assert text(seed=2)[0] != first[0]
    unseeded = [text() for _ in range(4)]
    assert {cache for _, cache in unseeded} == {"miss"} and len({answer for answer, _ in unseeded}) > 1


def test_a_repeated_greedy_request_comes_from_the_cache_streamed_or_not(client):
    first = complete(client, prompt="only asked here")
    again = complete(client, prompt="only asked here")
    assert [response.headers["x-pacos-cache"] for response in (first, again)] == ["miss", "hit"]
    assert first.json()["choices"] == again.json()["choices"] and first.json()["usage"] == again.json()["usage"]
    events, done, headers = stream(client, prompt="only asked here")
    assert headers["x-pacos-cache"] == "hit" and done
    assert events[0]["choices"][0]["text"] == first.json()["choices"][0]["text"]
    assert complete(client, prompt="only asked here", max_tokens=11).headers["x-pacos-cache"] == "miss"
    assert complete(client, prompt="only asked here", model="pacos:tuned").headers["x-pacos-cache"] == "miss"


def test_a_delta_is_a_model_of_its_own(client):
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["pacos", "pacos:tuned"]
    plain, tuned = (complete(client, model=name).json()["choices"][0]["text"] for name in names)
    assert plain != tuned


def test_an_answer_from_documents_names_its_sources(client):
    body = {"question": "How often does shearing take place?", "max_tokens": 16}
    response = client.post("/v1/rag", json=body)
    assert response.status_code == 200
    answer = response.json()
    assert answer["sources"][0]["document"] == "shearing.md" and len(answer["sources"]) == 2
    source = answer["sources"][0]
    assert "once a year" in source["text"] and source["start"] < source["end"] and 0 < source["score"] <= 1
    assert answer["usage"]["completion_tokens"] == 16 and answer["model"] == "pacos"
    assert set(answer["timings"]) == {"retrieve_s", "generate_s", "total_s"}
    assert len(client.post("/v1/rag", json=body | {"top_k": 1}).json()["sources"]) == 1
    assert client.post("/v1/rag", json=body).headers["x-pacos-cache"] == "hit"


def test_ask_gets_the_answers(client, url, greedy):
    from app.data.prompts import PacosTemplate

    prompt = PacosTemplate().prompt("Why?")
    assert ask(AskConfig(question="Why?", url=url, max_tokens=9))["text"] == greedy(prompt, 9).strip()
    answer = ask(AskConfig(question="Who will guard the herd?", url=url, max_tokens=9, rag=True))
    assert answer["sources"][0]["document"] == "guards.md"
    with pytest.raises(UserError, match="model='other' does not exist"):
        ask(AskConfig(question="?", url=url, model="other"))


def test_health_and_documentation_answer(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/docs").status_code == 200
    assert {"/v1/completions", "/v1/rag", "/v1/models", "/healthz"} <= client.get("/openapi.json").json()[
        "paths"
    ].keys()


@pytest.mark.parametrize(
    ("values", "status", "code", "param"),
    [
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"prompt": [1] * 2048}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": ""}, 400, "invalid_prompt", "prompt"),
        ({"prompt": [10**12]}, 400, "invalid_prompt", "prompt"),
        ({"prompt": []}, 422, "invalid_value", "prompt"),
        ({"prompt": {"a": 1}}, 422, "invalid_value", "prompt"),
        ({"prompt": "\ud83d"}, 422, "invalid_value", "prompt"),
        ({"max_tokens": "12"}, 422, "invalid_value", "max_tokens"),
        ({"temperature": 9}, 422, "invalid_value", "temperature"),
        ({"n": 2}, 400, "unsupported_parameter", "n"),
        ({"logprobs": 3}, 400, "unsupported_parameter", "logprobs"),
        ({"\ud83d": 3}, 400, "unsupported_parameter", "?"),
    ],
)
def test_every_mistake_has_its_status_and_an_error_in_openais_shape(client, values, status, code, param):
    body = {"model": "pacos", "prompt": PROMPT} | values
    for streamed in (False, True):
        content = json.dumps(body | {"stream": streamed})
        response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["code"], error["param"]) == (code, param)


def test_a_prompt_that_is_too_long_is_told_both_lengths(client):
    message = complete(client, prompt=[1] * 3000).json()["error"]["message"]
    assert "3000" in message and "2048" in message


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"[1, 2]", b'"text"', b"\xff\xfe", b"null", b'{"model": "pacos", "prompt": ' + b"[" * 100_000],
)
def test_a_body_that_is_no_request_is_refused(client, content):
    for path in ("/v1/completions", "/v1/rag"):
        response = client.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code in (400, 422), response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert client.post("/v1/completions", content=b"{").status_code == 422


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/completions", 405), ("GET", "/nothing", 404)])
def test_unknown_paths_are_refused_in_the_same_shape(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status and response.json()["error"]["code"]


def test_a_second_application_does_not_take_the_first_ones_place(client, url):
    with pytest.raises(UserError, match="an application 'pacos' runs on this cluster already"):
        serve_application(ServeConfig(port=int(url.rsplit(":", 1)[1])))
    assert client.get("/healthz").status_code == 200
