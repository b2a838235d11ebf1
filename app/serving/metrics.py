"""What Prometheus sees of the application, by the names that vLLM gives such metrics: its
`vllm:time_to_first_token_seconds` is `pacos_time_to_first_token_seconds` here.

Ray exports them at each node's metrics port, with `ray_` in front; it adds deployment, replica and application as
labels.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.serve import metrics

from app.gauges import LastingGauge
from app.serving.autoscaling import engine_rate
from app.serving.messages import Piece, Refusal, Started

if TYPE_CHECKING:
    from app.engine.engine import Stats

# vLLM's own, so that its dashboards' quantiles mean the same
_FIRST_TOKEN_S = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
_BETWEEN_TOKENS_S = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
_REQUEST_S = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920]
_TOKENS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000]
_SEARCH_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
_MODEL = ("model_name",)

_COUNTS: dict[str, tuple[str, str]] = {
    "generation_tokens": ("generated_tokens", "Tokens generated."),
    "prefix_cache_hits": ("reused_tokens", "Prompt tokens that were found in the KV cache instead."),
    "num_preemptions": ("preemptions", "Answers that gave up their blocks for others, and were computed again."),
}
"""Counters of an engine: what each counts up by, and what it means."""


class GeneratorMetrics:
    """Of one generator replica."""

    def __init__(self) -> None:
        self._first_token = _histogram("time_to_first_token_seconds", _FIRST_TOKEN_S, "From the request to its token.")
        self._between_tokens = _histogram("inter_token_latency_seconds", _BETWEEN_TOKENS_S, "From token to token.")
        self._request = _histogram("e2e_request_latency_seconds", _REQUEST_S, "From the request to its answer's end.")
        self._prompt_length = _histogram("request_prompt_tokens", _TOKENS, "Tokens of a request's prompts.")
        self._answer_length = _histogram("request_generation_tokens", _TOKENS, "Tokens of a request's answers.")
        self._prompt_tokens = _counter("prompt_tokens", "Prompt tokens of all requests.", _MODEL)
        self._success = _counter("request_success", "Answers that ended.", (*_MODEL, "finished_reason"))
        self._refused = _counter("request_refused", "Requests that got no answer, by the error's code.", ("code",))
        self._aborted = _counter("request_aborted", "Requests whose client went away.", ())
        self._running = _gauge("num_requests_running", "Answers that are being generated.")
        self._waiting = _gauge("num_requests_waiting", "Answers that wait for a place in the batch.")
        self._kv_usage = _gauge("kv_cache_usage_perc", "Share of the KV cache that running requests hold, 0 to 1.")
        self._rate = _gauge("engine_usage_perc", "Share of a full batch's tokens/s that it computes, 0 to 1.")
        self._delta_bytes = _gauge("delta_bytes", "Memory of the loaded deltas.")
        self._counters = {name: _counter(name, text, _MODEL) for name, (_, text) in _COUNTS.items()}
        self._counted: dict[tuple[str, str], int] = {}

    def watch(self, model: str, *, clock: Callable[[], float] = time.monotonic) -> "RequestWatch":
        """Of a request that begins now, for `model`."""
        return RequestWatch(self, model, clock)

    def set_engines(self, engines: Mapping[str, "Stats"]) -> None:
        """Gauges and counters of the engines, by name; to be called again and again."""
        for name, stats in engines.items():
            tags = {"model_name": name}
            self._running.set(stats.running, tags=tags)
            self._waiting.set(stats.waiting, tags=tags)
            self._kv_usage.set(1 - stats.free_blocks / stats.blocks if stats.blocks else 0.0, tags=tags)
            self._rate.set(engine_rate(stats), tags=tags)
            self._delta_bytes.set(stats.delta_bytes, tags=tags)
            for metric, (field, _) in _COUNTS.items():
                now = getattr(stats, field)
                before = self._counted.get((name, metric), 0)
                if now > before:
                    self._counters[metric].inc(now - before, tags=tags)
                self._counted[name, metric] = now  # lower than before where another engine has taken the name


class RequestWatch:
    """Sees what a request is answered with, item by item."""

    def __init__(self, sink: GeneratorMetrics, model: str, clock: Callable[[], float]) -> None:
        self._sink, self._clock = sink, clock
        self._tags = {"model_name": model}
        self._start = clock()
        self._last: float | None = None
        self._num_tokens = self._num_prompt_tokens = 0
        self._is_refused = False
        self._num_unfinished = 0

    def see(self, item: Started | Piece | Refusal, *, num_choices: int) -> None:
        if isinstance(item, Refusal):
            self._is_refused = True
            self._sink._refused.inc(tags={"code": item.code or str(item.status)})
        elif isinstance(item, Started):
            self._num_unfinished = num_choices
            self._num_prompt_tokens = sum(prompt.num_tokens for prompt in item.prompts)
            if self._num_prompt_tokens:
                self._sink._prompt_tokens.inc(self._num_prompt_tokens, tags=self._tags)
        else:
            self._see_piece(item)

    def _see_piece(self, piece: Piece) -> None:
        now = self._clock()
        if self._last is None:
            self._sink._first_token.observe(now - self._start, tags=self._tags)
        elif piece.num_tokens:
            self._sink._between_tokens.observe((now - self._last) / piece.num_tokens, tags=self._tags)
        self._last = now
        self._num_tokens += piece.num_tokens
        if piece.finish_reason is not None:
            self._num_unfinished -= 1
            self._sink._success.inc(tags={**self._tags, "finished_reason": piece.finish_reason})

    def end(self) -> None:
        """The answer is complete, or nobody waits for it any longer."""
        if self._is_refused:
            return
        if self._last is None or self._num_unfinished:
            self._sink._aborted.inc()
            return
        self._sink._request.observe(self._clock() - self._start, tags=self._tags)
        self._sink._prompt_length.observe(self._num_prompt_tokens, tags=self._tags)
        self._sink._answer_length.observe(self._num_tokens, tags=self._tags)


class CacheMetrics:
    """Of one ingress replica: where answers came from, and how its cache does."""

    def __init__(self) -> None:
        text = "Requests by what the response cache had: `hit`, `semantic`, `miss`, or `uncached`: not to be cached."
        self._requests = _counter("response_cache_requests", text, ("result",))
        self._errors = _counter("response_cache_errors", "Lookups and writes that the backend failed.", ())
        text = "Memory of the answers kept in this replica; 0 with Redis."
        self._bytes = LastingGauge(_gauge("response_cache_bytes", text, ()))
        text = "1 while the backend fails and is left alone, else 0."
        self._is_out = LastingGauge(_gauge("response_cache_backend_out", text, ()))
        self._counted = 0

    def count(self, result: str) -> None:
        self._requests.inc(tags={"result": result})

    def set_state(self, *, num_bytes: int, errors: int, is_out: bool) -> None:
        """`errors` is their number so far."""
        self._bytes.set(num_bytes)
        self._is_out.set(float(is_out))
        if errors > self._counted:
            self._errors.inc(errors - self._counted)
        self._counted = errors


class RetrieverMetrics:
    """Of one retriever replica."""

    def __init__(self) -> None:
        self._search = _histogram("retriever_search_seconds", _SEARCH_S, "Of a search, reranking included.", ("mode",))
        self._documents = LastingGauge(_gauge("retriever_documents", "Documents that are searched.", ()))
        self._version = _gauge("retriever_version", "Number of the last change that is searched.", ())
        self._lag = _gauge("retriever_lag_seconds", "Since when there may be changes that are not searched yet.", ())

    def searched(self, seconds: float, *, mode: str) -> None:
        self._search.observe(seconds, tags={"mode": mode})

    def set_documents(self, number: int) -> None:
        self._documents.set(number)

    def set_copy(self, *, version: int, lag_s: float) -> None:
        """Of a copy of the documents that are uploaded."""
        self._version.set(version)
        self._lag.set(lag_s)


class DocumentsMetrics:
    """Of the one replica that writes documents."""

    def __init__(self) -> None:
        self._version = _gauge("documents_version", "Number of the last change; a retriever's may be behind.", ())

    def set_version(self, version: int) -> None:
        self._version.set(version)


def _counter(name: str, text: str, tags: tuple[str, ...]) -> Any:
    return metrics.Counter(f"pacos_{name}", description=text, tag_keys=tags)


def _gauge(name: str, text: str, tags: tuple[str, ...] = _MODEL) -> Any:
    return metrics.Gauge(f"pacos_{name}", description=text, tag_keys=tags)


def _histogram(name: str, boundaries: Sequence[float], text: str, tags: tuple[str, ...] = _MODEL) -> Any:
    return metrics.Histogram(f"pacos_{name}", description=text, boundaries=list(boundaries), tag_keys=tags)
