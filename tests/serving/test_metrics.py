"""What is counted of requests and engines, without Ray; tests/serving/test_http.py reads it where Prometheus would."""

from types import SimpleNamespace
from typing import Any

import pytest

from app.serving import metrics
from app.serving.messages import Piece, PromptInfo, Refusal, Started
from app.serving.metrics import CacheMetrics, GeneratorMetrics


class Recorded:
    """Stands for any of Ray's metrics; keeps what it is told."""

    seen: dict[str, list[tuple[float, dict[str, str]]]] = {}

    def __init__(self, name: str, **about: Any) -> None:
        assert about["description"]
        self._values = self.seen.setdefault(name.removeprefix("pacos_"), [])
        self._tags = set(about["tag_keys"])

    def observe(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        assert set(tags or {}) == self._tags
        self._values.append((value, tags or {}))

    inc = set = observe


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[float, dict[str, str]]]]:
    monkeypatch.setattr(Recorded, "seen", {})
    kinds = SimpleNamespace(Counter=Recorded, Gauge=Recorded, Histogram=Recorded)
    monkeypatch.setattr(metrics, "metrics", kinds)
    return Recorded.seen


def values(seen: dict, name: str) -> list[float]:
    return [value for value, _ in seen[name]]


def test_a_request_is_timed_from_its_beginning_to_each_token(seen) -> None:
    times = iter([0.0, 0.5, 0.7, 1.3, 1.4])
    watch = GeneratorMetrics().watch("pacos", clock=lambda: next(times))
    watch.see(Started("hash", (PromptInfo(7),)), num_choices=1)
    watch.see(Piece(0, "a", 1), num_choices=1)
    watch.see(Piece(0, "b", 1), num_choices=1)
    watch.see(Piece(0, "cde", 3, "stop"), num_choices=1)
    watch.end()
    assert values(seen, "time_to_first_token_seconds") == [0.5]
    assert values(seen, "inter_token_latency_seconds") == pytest.approx([0.2, 0.2])
    assert values(seen, "e2e_request_latency_seconds") == [1.4]
    assert values(seen, "request_prompt_tokens") == values(seen, "prompt_tokens") == [7]
    assert values(seen, "request_generation_tokens") == [5]
    assert seen["request_success"] == [(1.0, {"model_name": "pacos", "finished_reason": "stop"})]
    assert not seen["request_aborted"] and not seen["request_refused"]


def test_a_refusal_and_a_client_that_leaves_are_no_success(seen) -> None:
    generator = GeneratorMetrics()
    refused = generator.watch("nobody-has-this-name")
    refused.see(Refusal(404, "no such model", code="model_not_found"), num_choices=1)
    refused.end()
    left = generator.watch("pacos")
    left.see(Started("hash", (PromptInfo(3),)), num_choices=2)
    left.see(Piece(0, "a", 1, "stop"), num_choices=2)
    left.end()
    assert seen["request_refused"] == [(1.0, {"code": "model_not_found"})]
    assert values(seen, "request_aborted") == [1.0] and not seen["e2e_request_latency_seconds"]


def test_an_engines_counts_go_up_by_what_is_new(seen) -> None:
    generator = GeneratorMetrics()

    def stats(**counts: int) -> Any:
        zero = dict.fromkeys(
            ("running", "waiting", "delta_bytes", "generated_tokens", "reused_tokens", "preemptions"), 0
        )
        return SimpleNamespace(**{**zero, "blocks": 10, "free_blocks": 4, **counts})

    generator.set_engines({"pacos": stats(generated_tokens=5, running=3)})
    generator.set_engines({"pacos": stats(generated_tokens=9, running=2)})
    generator.set_engines({"pacos": stats(generated_tokens=2)})  # another engine has the name
    generator.set_engines({"pacos": stats(generated_tokens=3)})
    assert values(seen, "generation_tokens") == [5, 4, 1]
    assert values(seen, "num_requests_running") == [3, 2, 0, 0]
    assert values(seen, "kv_cache_usage_perc") == pytest.approx([0.6] * 4)


def test_the_caches_results_are_counted(seen) -> None:
    cache = CacheMetrics()
    for result in ("hit", "miss", "hit"):
        cache.count(result)
    assert [tags["result"] for _, tags in seen["response_cache_requests"]] == ["hit", "miss", "hit"]
