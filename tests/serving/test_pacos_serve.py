"""`pacos serve` as a process of its own, with a certificate: it speaks HTTPS alone, a request is one trace, and SIGTERM
finishes what was accepted."""

import signal

import httpx
import pytest
from certificates import Certificates, certificates

from app.config import AskConfig
from app.data.tokenization import load_tokenizer
from app.errors import UserError
from app.serving.ask import ask
from tests.serving.collector import collector
from tests.serving.load import until
from tests.serving.served_process import client_of, pacos_serve

pytestmark = [pytest.mark.own_ray, pytest.mark.slow]

TRACE, ROOT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def traced():
    """(Where spans go to, those that came.)"""
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where it runs, with what it prints in `output`."""
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def tls(folder) -> Certificates:
    return certificates(folder)


@pytest.fixture(scope="module")
def process(model_dir, free_port, traced, folder, tls):
    settings = [
        f"port={free_port}", f"generator.model={model_dir}", "generator.threads=1",
        f"tls.certificate={tls.certificate}", f"tls.key={tls.key}",
        "tracing.enabled=true", "tracing.sampling_ratio=0.001",
    ]  # fmt: skip
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": traced[0], "OTEL_BSP_SCHEDULE_DELAY": "200"}  # ms
    with pacos_serve(settings, folder, environment=environment) as process:
        yield process


@pytest.fixture(scope="module")
def client(process, free_port, tls):
    with client_of(process, free_port, authority=tls.authority) as client:
        yield client


def test_a_request_is_one_trace_from_the_proxy_to_the_engines_steps(client, traced, model_dir):
    letter = load_tokenizer(model_dir).encode("a")[0]  # a token with a text of its own: half a character is held back
    body = {"model": "pacos", "prompt": "traced", "max_tokens": 5, "temperature": 1.0, "logit_bias": {str(letter): 100}}
    headers = {"traceparent": f"00-{TRACE}-{ROOT}-01"}  # sampled, whatever sampling_ratio is
    assert client.post("/v1/completions", json=body, headers=headers).status_code == 200

    def mine():
        return {span.span_id.hex(): span for span in list(traced[1]) if span.trace_id.hex() == TRACE}

    def way_up():
        """From `decode` to the last span above it that is here, and that one's parent."""
        found, names, parent = mine(), [], None
        span = next((span for span in found.values() if span.name == "decode"), None)
        while span is not None:
            names.append(span.name)
            parent = span.parent_span_id.hex()
            span = found.get(parent)
        return names, parent

    until(lambda: way_up()[1] == ROOT)  # each process sends its own, some time later
    names, _ = way_up()
    assert names[:2] == ["decode", "generate"] and names[-1] == "POST /v1/completions", names  # FastAPI's own
    assert any("generator" in name for name in names), names
    until(lambda: any(span.name.startswith("proxy") for span in mine().values()))
    here = {span.name for span in mine().values()}
    assert "prefill" in here and any("replica_handle_request ingress" in name for name in here), here
    (generate,) = [span for span in mine().values() if span.name == "generate"]
    attributes = {attribute.key: attribute.value for attribute in generate.attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 5
    (decode,) = [span for span in mine().values() if span.name == "decode"]
    steps = [event.attributes[0].value.int_value for event in decode.events if event.name == "step"]
    assert steps and steps == sorted(set(steps)) and steps[-1] - steps[0] == 4, "a token a step, alone"


def test_an_endpoint_with_a_certificate_speaks_https_alone(client, tls, folder, free_port):
    url = f"https://127.0.0.1:{free_port}"
    until(lambda: f"{url}/v1/chat/completions" in (folder / "output").read_text())  # once it answers, it says where
    asked = AskConfig(question="What do alpacas eat?", url=url, max_tokens=3, ca_file=tls.authority)
    assert ask(asked)["usage"]["completion_tokens"] == 3
    with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(asked.model_copy(update={"ca_file": None}))
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{free_port}/healthz", timeout=10, trust_env=False)


def test_what_was_accepted_is_finished_and_what_comes_is_refused_until_it_ends(client, process):
    body = {"model": "pacos", "prompt": "An adult alpaca", "max_tokens": 1900, "temperature": 1.0}
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/healthz").status_code == 503, within_s=30)
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) >= 1
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(120) == 0
