from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app.serving import tracing
from app.serving.messages import GenerateRequest, Piece, PromptInfo, Refusal, Started
from app.serving.tracing import GenerationSpan, otlp_exporter

REQUEST = GenerateRequest("pacos", ("a secret question",), max_tokens=9, temperature=0.5)


@pytest.fixture
def provider(monkeypatch) -> TracerProvider:
    provider = TracerProvider()
    monkeypatch.setattr(tracing.trace, "get_tracer", provider.get_tracer)
    return provider


@pytest.fixture
def exporter(provider) -> Iterator[InMemorySpanExporter]:
    """What is traced within a request that Serve has sampled."""
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("serve").start_as_current_span("replica_handle_request"):
        yield exporter


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_generation_is_a_span_with_its_two_stages(exporter) -> None:
    span = GenerationSpan(REQUEST)
    for item in (Started("hash", (PromptInfo(7),)), Piece(0, "a", 1, step=41), Piece(0, "bc", 2, "stop", step=43)):
        span.see(item)
    span.end()
    spans = by_name(exporter)
    assert set(spans) == {"generate", "prefill", "decode"}
    whole = spans["generate"]
    assert whole.attributes is not None
    assert whole.attributes["gen_ai.request.model"] == "pacos"
    assert whole.attributes["gen_ai.usage.input_tokens"] == 7 and whole.attributes["gen_ai.usage.output_tokens"] == 3
    assert whole.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert whole.parent is not None, "within the request's"
    for stage in (spans["prefill"], spans["decode"]):
        assert stage.parent is not None and stage.parent.span_id == whole.context.span_id
    events = [(event.name, dict(event.attributes or {})) for event in spans["decode"].events]
    assert events == [
        ("step", {"pacos.engine.step": 41, "pacos.tokens": 1}), ("step", {"pacos.engine.step": 43, "pacos.tokens": 2})
    ]  # fmt: skip
    assert spans["prefill"].end_time <= spans["decode"].start_time  # type: ignore[operator]
    assert "secret" not in whole.to_json()


def test_a_refusal_is_an_error_and_a_client_that_leaves_ends_the_span(exporter) -> None:
    refused = GenerationSpan(REQUEST)
    refused.see(Refusal(429, "full", code="queue_full"))
    refused.end()
    spans = by_name(exporter)
    assert set(spans) == {"generate", "prefill"} and spans["generate"].status.status_code is trace.StatusCode.ERROR
    assert spans["generate"].attributes["error.type"] == "queue_full"  # type: ignore[index]
    exporter.clear()
    GenerationSpan(REQUEST).end()
    assert set(by_name(exporter)) == {"generate", "prefill"}


def test_a_request_that_was_not_sampled_begins_no_trace_of_its_own(provider) -> None:
    span = GenerationSpan(REQUEST)
    span.see(Started("hash", (PromptInfo(7),)))
    assert not span._span.is_recording()
    span.end()


def test_the_exporter_is_what_serve_asks_for() -> None:
    from ray.serve._private.tracing_utils import _load_span_processors

    (processor,) = _load_span_processors(tracing.EXPORTER, "unused.json")
    processor.shutdown()
    assert otlp_exporter.__module__ + ":" + otlp_exporter.__name__ == tracing.EXPORTER
