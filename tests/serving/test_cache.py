import asyncio

from app.config import CacheConfig
from app.serving.cache import CacheClient, CacheDeployment


class Handle:
    """A deployment handle whose calls run `behave`."""

    def __init__(self, behave):
        self.behave = behave
        self.calls = 0

    def options(self, *, method_name):
        self.method_name = method_name
        return self

    def remote(self, *args):
        self.calls += 1
        return self.behave(self.method_name, *args)


async def hang(*args):
    await asyncio.sleep(60)


async def fail(*args):
    raise ConnectionError("the replica is gone")


def test_values_come_back_through_the_client():
    async def main():
        deployment = CacheDeployment(CacheConfig())
        client = CacheClient(Handle(lambda method, *args: getattr(deployment, method)(*args)))
        assert await client.get("key") is None
        client.put("key", {"answer": 1})
        await asyncio.sleep(0.01)
        assert await client.get("key") == {"answer": 1}
        assert await deployment.stats() == {"hits": 1, "misses": 1, "errors": 0}

    asyncio.run(main())


def test_a_hanging_cache_costs_one_deadline_and_then_nothing():
    async def main():
        handle = Handle(hang)
        client = CacheClient(handle, deadline_s=0.05, pause_s=60)
        for _ in range(20):
            assert await client.get("key") is None
        assert handle.calls == 1

    asyncio.run(main())


def test_a_failing_cache_is_a_miss_and_is_tried_again_after_the_pause():
    async def main():
        handle, now = Handle(fail), [0.0]
        client = CacheClient(handle, pause_s=5, clock=lambda: now[0])
        assert await client.get("key") is None
        now[0] = 4.9
        client.put("key", {})
        await asyncio.sleep(0)  # the write in the background has its turn
        assert handle.calls == 1
        now[0] = 5.0
        assert await client.get("key") is None
        assert handle.calls == 2

    asyncio.run(main())
