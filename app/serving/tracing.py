"""OpenTelemetry: the span of a generation, within those that Serve makes of a request's way to it, and their exporter.

Serve's tracing is off unless it is started with it, and then a span here costs nothing.
"""

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import Span, StatusCode

from app.errors import UserError
from app.serving.messages import GenerateRequest, Piece, Refusal, Started

EXPORTER = "app.serving.tracing:otlp_exporter"
"""For Serve's RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH."""


def otlp_exporter() -> list[SpanProcessor]:
    """Spans to a collector, by OTLP over HTTP; where it is, OpenTelemetry's own environment variables say, such as
    OTEL_EXPORTER_OTLP_ENDPOINT.

    Raises:
        UserError: the exporter is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise UserError("tracing needs an exporter: pip install 'pacos[tracing]'") from None
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


class GenerationSpan:
    """`generate`, from the request to its last token, and in it `prefill`, until the first token, and `decode`.

    `prefill` includes the wait for a place in the batch. Attributes have OpenTelemetry's names for generative models.
    `decode` has an event `step` for each of the engine's steps that brought text, with its number: requests that were
    computed together have numbers in common.
    """

    def __init__(self, request: GenerateRequest) -> None:
        attributes: dict[str, str | int | float] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": request.model,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": request.temperature,
        }
        # Where Serve has not sampled the request there is no span to be within, and one would begin a trace of its own.
        is_sampled = trace.get_current_span().get_span_context().trace_flags.sampled
        self._tracer = trace.get_tracer("pacos") if is_sampled else trace.NoOpTracer()
        self._span = self._tracer.start_span("generate", attributes=attributes)
        self._stage = self._begin("prefill")
        self._num_tokens = 0
        self._reasons: dict[int, str] = {}

    def see(self, item: Started | Piece | Refusal) -> None:
        if isinstance(item, Refusal):
            self._span.set_attribute("error.type", item.code)
            self._span.set_status(StatusCode.ERROR, item.message)
        elif isinstance(item, Started):  # with the first token
            self._span.set_attribute("gen_ai.usage.input_tokens", sum(prompt.num_tokens for prompt in item.prompts))
            self._stage.end()
            self._stage = self._begin("decode")
        else:
            self._num_tokens += item.num_tokens
            if item.step is not None:
                self._stage.add_event("step", {"pacos.engine.step": item.step, "pacos.tokens": item.num_tokens})
            if item.finish_reason is not None:
                self._reasons[item.index] = item.finish_reason

    def end(self) -> None:
        """The answer is complete, or nobody waits for it any longer."""
        self._stage.end()
        self._span.set_attribute("gen_ai.usage.output_tokens", self._num_tokens)
        self._span.set_attribute(
            "gen_ai.response.finish_reasons", [self._reasons[key] for key in sorted(self._reasons)]
        )
        self._span.end()

    def _begin(self, stage: str) -> Span:
        return self._tracer.start_span(stage, context=trace.set_span_in_context(self._span))
