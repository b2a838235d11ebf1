import asyncio

import httpx
from fastapi import FastAPI

from app.serving.draining import Doorkeeper, RefuseWhenEnding


def test_what_was_accepted_is_finished_and_what_comes_gets_a_503():
    go_on, inside = asyncio.Event(), asyncio.Semaphore(0)
    api, door = FastAPI(), Doorkeeper()
    api.add_middleware(RefuseWhenEnding, door=door)

    @api.get("/slow")
    async def slow():
        inside.release()
        await go_on.wait()
        return "done"

    async def main():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            accepted = [asyncio.create_task(client.get("/slow")) for _ in range(2)]
            for _ in accepted:
                await inside.acquire()
            closing = asyncio.create_task(door.close())
            await asyncio.sleep(0)  # it has begun, and waits
            refused = await client.get("/slow")
            assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
            error = refused.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["code"] == "shutting_down"
            assert not closing.done(), "two are still inside"
            go_on.set()
            assert {(await response).json() for response in accepted} == {"done"}
            await asyncio.wait_for(closing, 5)

    asyncio.run(main())


def test_a_request_that_fails_leaves_too():
    api, door = FastAPI(), Doorkeeper()
    api.add_middleware(RefuseWhenEnding, door=door)

    @api.get("/broken")
    async def broken():
        raise RuntimeError("broken")

    async def main():
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/broken")).status_code == 500
        await asyncio.wait_for(door.close(), 5)

    asyncio.run(main())
