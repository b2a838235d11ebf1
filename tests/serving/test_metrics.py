"""What is counted of requests and engines, without Ray; tests/serving/test_http.py reads it where Prometheus would."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from app.config import CacheConfig, validate
from app.local_cluster import free_port
from app.serving import metrics, retriever
from app.serving.cache import AnswerCache, AnswerKey
from app.serving.messages import Choice, Completion, Piece, PromptInfo, Refusal, Started
from app.serving.metrics import CacheMetrics, GeneratorMetrics, RetrieverMetrics
from tests.recorded_metrics import Seen, recorded, values


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return recorded(monkeypatch, metrics)


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
            ("running", "waiting", "delta_bytes", "generated_tokens", "reused_tokens", "preemptions", "fixed_s"), 0
        )
        return SimpleNamespace(**{**zero, "blocks": 10, "free_blocks": 4, "free_slots": 5, "answer_s": 0, **counts})

    generator.set_engines({"pacos": stats(generated_tokens=5, running=3)})
    generator.set_engines({"pacos": stats(generated_tokens=9, running=2)})
    generator.set_engines({"pacos": stats(generated_tokens=2)})  # another engine has the name
    generator.set_engines({"pacos": stats(generated_tokens=3)})
    assert values(seen, "generation_tokens") == [5, 4, 1]
    assert values(seen, "num_requests_running") == [3, 2, 0, 0]
    assert values(seen, "kv_cache_usage_perc") == pytest.approx([0.6] * 4)
    assert values(seen, "engine_usage_perc") == pytest.approx([3 / 8, 2 / 7, 0, 0])


def test_the_caches_results_are_counted(seen) -> None:
    cache = CacheMetrics()
    for result in ("hit", "miss", "hit"):
        cache.count(result)
    assert [tags["result"] for _, tags in seen["response_cache_requests"]] == ["hit", "miss", "hit"]


def test_a_caches_failures_are_counted_once_and_its_state_is_the_last_one(seen) -> None:
    cache = CacheMetrics()
    for num_bytes, errors, is_out in ((100, 0, False), (100, 2, True), (300, 2, False), (300, 3, True)):
        cache.set_state(num_bytes=num_bytes, errors=errors, is_out=is_out)
    assert values(seen, "response_cache_errors") == [2, 1]
    assert values(seen, "response_cache_backend_out") == [0, 1, 0, 1]
    assert values(seen, "response_cache_bytes") == [100, 100, 300, 300]


def test_searches_are_timed_by_how_they_searched(seen) -> None:
    replica = RetrieverMetrics()
    replica.searched(0.02, mode="dense")
    replica.set_documents(7)
    replica.set_copy(version=12, lag_s=0.5)
    assert seen["retriever_search_seconds"] == [(0.02, {"mode": "dense"})]
    assert values(seen, "retriever_documents") == [7]
    assert values(seen, "retriever_version") == [12] and values(seen, "retriever_lag_seconds") == [0.5]


def test_a_cache_tells_what_it_holds_and_that_its_redis_is_away(seen) -> None:
    completion = Completion("hash", (PromptInfo(3),), (Choice("eats hay", "stop", 2),))

    async def use(config: CacheConfig) -> None:
        cache = AnswerCache(config)
        cache.put(AnswerKey("key", completion.model_hash), completion)
        await asyncio.gather(*cache._writes)
        await cache.get(AnswerKey("key", completion.model_hash))

    asyncio.run(use(CacheConfig()))
    assert values(seen, "response_cache_bytes")[0] == 0 < values(seen, "response_cache_bytes")[-1]
    assert set(values(seen, "response_cache_backend_out")) == {0}
    asyncio.run(use(validate(CacheConfig, {"backend": {"type": "redis", "url": f"redis://127.0.0.1:{free_port()}/0"}})))
    assert values(seen, "response_cache_bytes")[-1] == 0
    assert values(seen, "response_cache_backend_out")[-2:] == [1, 1]
    assert sum(values(seen, "response_cache_errors")) == 2  # the write, and the lookup while Redis is left alone


def test_a_copy_falls_behind_while_its_library_is_away(seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retriever, "FOLLOW_EVERY_S", 0.01)
    answers, ending = iter([True, False]), threading.Event()

    class Follower:
        num_documents, num_changes = 3, 5

        def catch_up(self) -> bool:
            for is_new in answers:
                return is_new
            if max(values(seen, "retriever_lag_seconds")) > 0.2:
                ending.set()
            raise ConnectionError("the library is away")

    following = retriever._Following(Follower(), ending, RetrieverMetrics())  # type: ignore[arg-type]
    following.start()
    following.join(30)
    assert not following.is_alive()
    lags = values(seen, "retriever_lag_seconds")
    assert max(lags[:2]) < 0.2 < lags[-1] and lags[2:] == sorted(lags[2:])
    assert values(seen, "retriever_documents") == [3] and set(values(seen, "retriever_version")) == {5}
