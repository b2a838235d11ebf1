"""The application on a real Serve, asked over HTTP."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
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
            "model": str(model_dir), "deltas": {"tuned": str(delta_dir)}, "precision": "fp32", "threads": 1,
            "max_batch_size": 8,
        },
        "retriever": {"index": str(index_dir), "top_k": 2},
    }  # fmt: skip
    states = []
    yield serve_application(validate(ServeConfig, config), progress=states.append)
    assert set(states[-1].values()) == {"HEALTHY"} and set(states[-1]) == {"ingress", "generator", "retriever"}
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


def until_hit(ask):
    """What `ask` returns once it comes from the cache: that is passed over for seconds where it was slow once."""
    deadline = time.monotonic() + 30
    while (response := ask()).headers["x-pacos-cache"] != "hit":
        assert time.monotonic() < deadline, "never cached"
        time.sleep(0.2)
    return response


def test_a_repeated_greedy_request_comes_from_the_cache_streamed_or_not(client):
    first = complete(client, prompt="only asked here")
    assert first.headers["x-pacos-cache"] == "miss"
    again = until_hit(lambda: complete(client, prompt="only asked here"))
    assert first.json()["choices"] == again.json()["choices"] and first.json()["usage"] == again.json()["usage"]
    events, done, headers = stream(client, prompt="only asked here")
    assert headers["x-pacos-cache"] == "hit" and done
    assert events[0]["choices"][0]["text"] == first.json()["choices"][0]["text"]
    assert complete(client, prompt="only asked here", max_tokens=11).headers["x-pacos-cache"] == "miss"
    assert complete(client, prompt="only asked here", model="pacos:tuned").headers["x-pacos-cache"] == "miss"


def test_a_hundred_equal_requests_at_once_compute_one(client, url, greedy):
    def stats():
        from ray import serve

        return serve.get_deployment_handle("generator", "pacos").stats.remote().result()["pacos"]

    before = stats()["generated_tokens"]
    body = {"model": "pacos", "prompt": "asked by many at once", "max_tokens": 60, "temperature": 0}
    streams, wholes = 20, 80

    async def ask_all() -> list[str]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as client:

            async def whole() -> str:
                return (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]

            async def streamed() -> str:
                response = await client.post("/v1/completions", json=body | {"stream": True})
                events = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
                return "".join(event["choices"][0]["text"] for event in events)

            return await asyncio.gather(*(whole() for _ in range(wholes)), *(streamed() for _ in range(streams)))

    assert set(asyncio.run(ask_all())) == {greedy("asked by many at once", 60)}
    assert stats()["generated_tokens"] - before in (60, 120), "once for all, or once for each of both ways"


def test_a_delta_is_a_model_of_its_own(client):
    listed = client.get("/v1/models").json()["data"]
    names = [model["id"] for model in listed if model["template"]]
    assert names == ["pacos", "pacos:tuned"] and listed[-1]["id"] == "pacos-embedder"
    plain, tuned = (complete(client, model=name).json()["choices"][0]["text"] for name in names)
    assert plain != tuned


def test_a_search_names_passages_by_meaning_and_by_words(client):
    def found(**values):
        response = client.post("/v1/search", json={"query": "How often does shearing take place?"} | values)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    both = found(top_k=2)
    assert both[0]["document"] == "shearing.md" and both[0]["start"] < both[0]["end"] and 1 >= both[0]["score"] > 0
    assert found(top_k=1, mode="words")[0]["document"] == "shearing.md"
    assert found(query="xylophone", mode="words") == []
    assert client.post("/v1/search", json={"query": "x", "mode": "magic"}).json()["error"]["param"] == "mode"
    assert client.post("/v1/search", json={"query": ""}).status_code == 422


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
    until_hit(lambda: client.post("/v1/rag", json=body))


def test_ask_gets_the_answers(client, url, greedy):
    from app.data.prompts import PacosTemplate

    prompt = PacosTemplate().prompt("Why?")
    assert ask(AskConfig(question="Why?", url=url, max_tokens=9))["text"] == greedy(prompt, 9).strip()
    answer = ask(AskConfig(question="Who will guard the herd?", url=url, max_tokens=9, rag=True))
    assert answer["sources"][0]["document"] == "guards.md"
    with pytest.raises(UserError, match="404: model 'other' does not exist"):
        ask(AskConfig(question="?", url=url, model="other"))


@pytest.fixture
def openai(url):
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_openais_client_completes(openai, greedy):
    answer = openai.completions.create(
        model="pacos", prompt=[PROMPT, "foxes"], max_tokens=12, temperature=0, logprobs=2
    )
    assert [choice.text for choice in answer.choices] == [greedy(PROMPT, 12), greedy("foxes", 12)]
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
    assert all(
        max(top, key=top.get) == token for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
    )
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset[-1] == len("".join(logprobs.tokens[:-1]))
    pieces = openai.completions.create(
        model="pacos", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2, stream=True
    )
    chunks = [chunk.choices[0] for chunk in pieces]
    assert "".join(choice.text for choice in chunks) == answer.choices[0].text
    offsets = [offset for choice in chunks for offset in choice.logprobs.text_offset]
    assert offsets == logprobs.text_offset


def test_openais_client_chats(openai, greedy):
    from app.data.prompts import PacosTemplate

    messages = [{"role": "user", "content": "Why do alpacas hum?"}]
    answer = openai.chat.completions.create(
        model="pacos", messages=messages, max_completion_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    expected = greedy(PacosTemplate().prompt("Why do alpacas hum?"), 12)
    assert choice.message.role == "assistant" and choice.message.content == expected.lstrip()
    assert b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode(errors="replace") == expected
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 12
    assert answer.usage.completion_tokens == 12 and choice.finish_reason == "length"
    several = openai.chat.completions.create(
        model="pacos", messages=messages, max_tokens=12, temperature=1.5, n=3, seed=1, presence_penalty=0.5
    )
    assert len({choice.message.content for choice in several.choices}) == 3


def test_openais_client_streams_a_chat(openai):
    asked = {
        "model": "pacos:tuned", "messages": [{"role": "user", "content": "hay?"}], "max_tokens": 30, "temperature": 1.5,
        "seed": 3, "n": 2,
    }  # fmt: skip
    *chunks, last = openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    whole = openai.chat.completions.create(**asked)
    for index, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == choice.finish_reason
        assert "".join(choice.delta.content for choice in mine) == choice.message.content
    assert last.usage == whole.usage and not last.choices


def test_openais_client_is_asynchronous_too(url, greedy):
    from openai import AsyncOpenAI

    async def ask_all(prompts: list[str]) -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            answers = [client.completions.create(model="pacos", prompt=p, max_tokens=9, temperature=0) for p in prompts]
            texts = [answer.choices[0].text for answer in await asyncio.gather(*answers)]
            stream = await client.completions.create(
                model="pacos", prompt=prompts[0], max_tokens=9, temperature=0, stream=True
            )
            return [*texts, "".join([chunk.choices[0].text async for chunk in stream])]

    prompts = ["winter", "llamas", "clippers"]
    assert asyncio.run(ask_all(prompts)) == [greedy(prompt, 9) for prompt in [*prompts, prompts[0]]]


def test_openais_client_understands_what_went_wrong(openai):
    import openai as api

    assert [model.id for model in openai.models.list()] == ["pacos", "pacos:tuned", "pacos-embedder"]
    with pytest.raises(api.NotFoundError, match="model 'other' does not exist"):
        openai.completions.create(model="other", prompt="x")
    with pytest.raises(api.BadRequestError) as error:
        openai.chat.completions.create(model="pacos", messages=[{"role": "user", "content": "hay " * 3000}])
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"
    with pytest.raises(api.BadRequestError, match="user and assistant in turn, the user last"):
        openai.chat.completions.create(model="pacos", messages=[{"role": "assistant", "content": "x"}])
    with pytest.raises(api.BadRequestError, match="not supported by this server: tools"):
        openai.chat.completions.create(model="pacos", messages=[{"role": "user", "content": "x"}], tools=[])
    with pytest.raises(api.UnprocessableEntityError, match="temperature"):
        openai.completions.create(model="pacos", prompt="x", temperature=9)


def test_openais_client_embeds(openai, index_dir):
    """With the index's embedder. The client asks for base64 unless told otherwise, and decodes it."""
    import openai as api

    from app.retrieval.embedding import Embedder
    from app.retrieval.folder import read_manifest

    texts = ["How often are alpacas shorn?", "Shearing takes place once a year.", "The bank closes at noon."]
    answer = openai.embeddings.create(model="pacos-embedder", input=texts)
    vectors = np.array([item.embedding for item in answer.data])
    assert [item.index for item in answer.data] == [0, 1, 2]
    embedder = Embedder(read_manifest(index_dir).embedder)
    np.testing.assert_allclose(vectors, embedder.embed(texts), atol=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(embedder.count_tokens(texts))
    as_floats = openai.embeddings.create(
        model="pacos-embedder", input=texts[0], encoding_format="float", dimensions=vectors.shape[1]
    )
    np.testing.assert_allclose(as_floats.data[0].embedding, vectors[0], atol=1e-6)
    with pytest.raises(api.NotFoundError, match="there is 'pacos-embedder'"):
        openai.embeddings.create(model="pacos", input="x")
    with pytest.raises(api.BadRequestError, match="dimensions=3: this embedder's vectors have"):
        openai.embeddings.create(model="pacos-embedder", input="x", dimensions=3)
    for wrong in ("", [], ["x", ""], [1, 2], [[1]], ["x"] * 2049):
        with pytest.raises(api.UnprocessableEntityError, match="input: must be a string or a list of 1 to 2048"):
            openai.embeddings.create(model="pacos-embedder", input=wrong)


def test_a_chat_from_documents_cites_them(openai):
    asked = {
        "model": "pacos", "messages": [{"role": "user", "content": "How often does shearing take place?"}],
        "max_tokens": 8, "temperature": 0, "extra_body": {"rag": True, "rag_top_k": 1},
    }  # fmt: skip
    answer = openai.chat.completions.create(**asked)
    (citation,) = answer.citations
    assert citation["document"] == "shearing.md" and "once a year" in citation["text"]
    first, *chunks = openai.chat.completions.create(**asked, stream=True)
    assert first.citations == answer.citations and not first.choices
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == answer.choices[0].message.content
    plain = openai.chat.completions.create(**asked | {"extra_body": {}})
    assert plain.usage.prompt_tokens < answer.usage.prompt_tokens and not hasattr(plain, "citations")


def test_the_plain_routes_answer_with_and_without_the_template(client, greedy):
    from app.data.prompts import PacosTemplate

    def text(path, **values):
        response = client.post(path, json={"prompt": "Why?", "max_tokens": 9} | values)
        assert response.status_code == 200, response.text
        return response.json()["text"]

    answer = greedy(PacosTemplate().prompt("Why?"), 9).strip()
    assert text("/generate") == text("/generate_text") == answer
    assert text("/generate_text_without_prompt") == greedy("Why?", 9)
    assert text("/generate", model="pacos:tuned") != answer
    assert client.post("/generate", json={"prompt": ""}).status_code == 422
    assert client.post("/generate", json={"prompt": "x", "n": 2}).json()["error"]["code"] == "unsupported_parameter"


def test_prometheus_sees_requests_tokens_and_the_cache(client):
    import ray

    complete(client, prompt="counted", max_tokens=5, temperature=0)
    complete(client, prompt="counted", max_tokens=5, temperature=0)
    node = ray.nodes()[0]
    names = {
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_sum", "e2e_request_latency_seconds_bucket",
        "num_requests_running", "kv_cache_usage_perc", "engine_usage_perc", "prompt_tokens", "generation_tokens",
        "request_success", "response_cache_requests",
    }  # fmt: skip
    deadline = time.monotonic() + 60  # Ray collects them every ten seconds
    while True:
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("ray_pacos_")]
        missing = {name for name in names if not any(line.startswith(f"ray_pacos_{name}") for line in lines)}
        if not missing:
            break
        assert time.monotonic() < deadline, missing
        time.sleep(1)
    hits = [line for line in lines if line.startswith("ray_pacos_response_cache_requests") and 'result="hit"' in line]
    assert any('deployment="ingress"' in line for line in hits), hits  # a test without Ray has counted some of its own
    assert any('model_name="pacos"' in line and "first_token" in line for line in lines)


def test_health_and_documentation_answer(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/docs").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/rag", "/v1/models", "/healthz", "/generate"} <= paths.keys()


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
        ({"n": 10_000}, 422, "invalid_value", "n"),
        ({"n": 128, "prompt": ["x"] * 10}, 400, "too_many_choices", "n"),
        ({"echo": True}, 400, "unsupported_parameter", "echo"),
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
