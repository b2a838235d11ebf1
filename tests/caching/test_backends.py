import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from app.caching.backends import BackendUnavailable, MemoryBackend, RedisBackend, make_backend
from app.caching.exact import ResponseCache
from app.config.serving import MemoryCacheConfig, RedisCacheConfig
from app.errors import UserError
from app.local_cluster import free_port


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


def test_memory_forgets_what_was_used_longest_ago() -> None:
    async def scenario() -> None:
        backend = MemoryBackend(max_bytes=10_000)
        await backend.put("a", "1" * 4000, ttl_s=60)
        await backend.put("b", "2" * 4000, ttl_s=60)
        assert await backend.get("a") == "1" * 4000
        await backend.put("c", "3" * 4000, ttl_s=60)
        assert [(await backend.get(key) or "none")[0] for key in "abc"] == ["1", "n", "3"]
        assert len(backend) == 2 and 8000 < backend.num_bytes <= 10_000
        await backend.put("a", "4", ttl_s=60)
        assert 4000 < backend.num_bytes < 5000, "what was replaced takes nothing"
        await backend.put("b", "5" * 20_000, ttl_s=60)
        assert await backend.get("b") is None and len(backend) == 2, "what fits nowhere pushes nothing out"

    asyncio.run(scenario())


def test_memory_forgets_what_has_expired_and_a_new_value_lives_anew() -> None:
    async def scenario() -> None:
        now = 0.0
        backend = MemoryBackend(max_bytes=10_000, clock=lambda: now)
        await backend.put("a", "1", ttl_s=10)
        now = 9.9
        assert await backend.get("a") == "1"
        await backend.put("a", "2", ttl_s=10)
        now = 19.8
        assert await backend.get("a") == "2"
        now = 19.9
        assert await backend.get("a") is None
        assert len(backend) == 0

    asyncio.run(scenario())


def test_an_empty_text_is_a_value() -> None:
    async def scenario() -> None:
        backend = MemoryBackend(max_bytes=10_000)
        await backend.put("a", "", ttl_s=10)
        assert await backend.get("a") == ""

    asyncio.run(scenario())


def test_redis_keeps_answers_for_all_clients_until_they_expire(redis_url: str) -> None:
    async def scenario() -> None:
        writer = make_backend(RedisCacheConfig(url=redis_url, timeout_s=5))
        reader = make_backend(RedisCacheConfig(url=redis_url, timeout_s=5))
        assert await reader.get("a") is None
        await writer.put("a", '{"text": "Größe 🦙"}', ttl_s=60)
        await writer.put("b", "soon gone", ttl_s=0.02)
        assert await reader.get("a") == '{"text": "Größe 🦙"}'
        await asyncio.sleep(0.1)
        assert await reader.get("b") is None
        await writer.close()
        await reader.close()

    asyncio.run(scenario())


def test_many_lookups_at_once_share_the_connections(redis_url: str) -> None:
    async def scenario() -> None:
        cache = ResponseCache(RedisBackend(redis_url, timeout_s=5), ttl_s=60)
        await asyncio.gather(*(cache.put(str(number), {"number": number}) for number in range(100)))
        found = await asyncio.gather(*(cache.get(str(number)) for number in range(100)))
        assert found == [{"number": number} for number in range(100)]
        assert cache.errors == 0
        await cache.close()

    asyncio.run(scenario())


def test_a_server_that_refuses_is_a_quick_miss_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        cache = ResponseCache(RedisBackend(f"redis://127.0.0.1:{free_port()}/0", timeout_s=2), ttl_s=60)
        for _ in range(5):
            assert await cache.get("a") is None
            await cache.put("a", {"text": "b"})
        assert cache.errors == 10
        await cache.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert len(caplog.records) == 1 and "Redis is unreachable" in caplog.text


def test_a_server_that_never_answers_costs_one_timeout_and_is_then_left_alone(silent_server: str) -> None:
    async def scenario() -> None:
        now = 0.0
        backend = RedisBackend(silent_server, timeout_s=0.1, pause_s=5, clock=lambda: now)
        with pytest.raises(BackendUnavailable, match=r"no answer within 0\.1 s"):
            await backend.get("a")
        now = 4.9
        with pytest.raises(BackendUnavailable, match="left alone"):
            await backend.put("a", "b", ttl_s=60)
        now = 5.1
        with pytest.raises(BackendUnavailable, match="no answer"):
            await backend.get("a")
        await backend.close()

    asyncio.run(asyncio.wait_for(scenario(), timeout=30))


def test_a_server_that_comes_back_is_used_again(redis_url: str) -> None:
    async def scenario() -> None:
        backend = RedisBackend(redis_url, timeout_s=5, pause_s=0.05)
        await backend.put("a", "1", ttl_s=60)
        await backend._client.connection_pool.disconnect()  # what a restart of the server does to a client
        for _ in range(100):
            try:
                assert await backend.get("a") == "1"
                break
            except BackendUnavailable:
                await asyncio.sleep(0.06)
        else:
            raise AssertionError("it never came back")
        await backend.close()

    asyncio.run(scenario())


def test_a_url_that_is_none_is_refused_without_showing_its_password() -> None:
    with pytest.raises(UserError, match=r"cache\.backend\.url is not a Redis URL") as caught:
        make_backend(RedisCacheConfig(url="http://user:secret@host"))
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match=r"cache\.backend\.url"):
        make_backend(RedisCacheConfig(url="redis://host:port/0"))


def test_redis_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(UserError, match=r"pip install pacos\[redis\]"):
        make_backend(RedisCacheConfig(url="redis://localhost"))


def test_memory_is_the_default_and_needs_no_redis() -> None:
    check = (
        "import sys\n"
        "from app.caching.backends import MemoryBackend, make_backend\n"
        "from app.config.serving import CacheConfig\n"
        "assert isinstance(make_backend(CacheConfig().backend), MemoryBackend)\n"
        "assert not {'redis', 'ray', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
    assert isinstance(make_backend(MemoryCacheConfig(max_bytes=3)), MemoryBackend)
