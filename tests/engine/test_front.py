import asyncio
import itertools
import time
from contextlib import aclosing

import pytest
from single import alone

from app.engine.engine import Engine
from app.engine.events import ContextLengthExceeded, QueueFull
from app.engine.front import EngineFront, EngineStopped, GenerationFailed
from app.engine.sampling import Sampling


@pytest.fixture
def front(model):
    front = EngineFront(Engine(model, max_batch_size=4, max_queue=8))
    yield front
    front.shutdown()


async def tokens_of(front, ids, sampling):
    async with aclosing(front.generate(ids, sampling)) as events:
        return [event.token async for event in events if event.token is not None]


async def until(condition, timeout_s=30.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def slow_down(front, delay_s=0.03):
    step = front._engine.step

    def slow_step():
        time.sleep(delay_s)
        return step()

    front._engine.step = slow_step


def test_concurrent_requests_equal_single_ones(front, model, prompts):
    async def main():
        return await asyncio.gather(*(tokens_of(front, ids, Sampling(max_tokens=12)) for ids in prompts))

    assert asyncio.run(main()) == [alone(model, ids, Sampling(max_tokens=12)) for ids in prompts]


def test_cancelling_one_reader_frees_its_slot_and_touches_nobody_else(front, model, prompts):
    slow_down(front)

    async def main():
        doomed = asyncio.create_task(tokens_of(front, prompts[1], Sampling(max_tokens=40)))
        kept = asyncio.create_task(tokens_of(front, prompts[0], Sampling(max_tokens=25)))
        await until(lambda: front.stats().running == 2)
        doomed.cancel()
        await until(lambda: front.stats().running == 1)
        assert not kept.done()
        return await kept

    assert asyncio.run(main()) == alone(model, prompts[0], Sampling(max_tokens=25))
    assert front.stats().free_slots == 4


def test_leaving_the_stream_early_aborts_the_request(front, prompts):
    slow_down(front)

    async def main():
        async with aclosing(front.generate(prompts[0], Sampling(max_tokens=40))) as events:
            async for _ in events:
                break
        await until(lambda: front.stats().running == 0)
        assert front.stats().generated_tokens < 20

    asyncio.run(main())


def test_errors_reach_the_caller(front):
    with pytest.raises(ContextLengthExceeded):
        asyncio.run(tokens_of(front, [1] * 500, Sampling(max_tokens=1)))


def test_a_full_queue_refuses_only_the_requests_beyond_it(model, prompts):
    front = EngineFront(Engine(model, max_batch_size=1, max_queue=1))
    slow_down(front)

    async def main():
        calls = (tokens_of(front, prompts[0], Sampling(max_tokens=10)) for _ in range(6))
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(main())
    front.shutdown()
    answered = [result for result in results if isinstance(result, list)]
    assert 2 <= len(answered) < 6 and all(result == answered[0] for result in answered)
    assert all(isinstance(result, QueueFull) for result in results if not isinstance(result, list))


def test_a_failing_step_fails_the_requests_in_flight_and_leaves_the_engine_usable(front, model, prompts):
    run = front._engine._runner.run

    def fail_once(sequences):
        front._engine._runner.run = run
        raise RuntimeError("out of something")

    async def main():
        front._engine._runner.run = fail_once
        with pytest.raises(GenerationFailed, match="RuntimeError: out of something"):
            await tokens_of(front, prompts[0], Sampling(max_tokens=5))
        assert front.stats().free_slots == 4
        return await tokens_of(front, prompts[0], Sampling(max_tokens=5))

    assert asyncio.run(main()) == alone(model, prompts[0], Sampling(max_tokens=5))


def test_events_come_in_batches_as_often_as_is_asked_for_the_first_and_the_last_at_once(model, prompts):
    steps = itertools.count()  # a step takes a second on this clock
    front = EngineFront(
        Engine(model, max_batch_size=4), batches_per_s=0.2, longest_pause_s=100.0, clock=lambda: float(next(steps))
    )

    async def sizes(prompt, **sampling):
        async with aclosing(front.batches(prompt, Sampling(ignore_eos=True, **sampling))) as batches:
            return [len(batch) async for batch in batches]

    async def two_at_once():
        return await asyncio.gather(*(sizes(prompt, max_tokens=16) for prompt in prompts[:2]))

    try:
        assert asyncio.run(sizes(prompts[0], max_tokens=14)) == [1, 5, 5, 3]
        for of_one in asyncio.run(two_at_once()):
            assert sum(of_one) == 16 and of_one[0] == 1 and max(of_one) > 5, "two share what is allowed"
    finally:
        front.shutdown()


def test_what_is_held_back_comes_when_it_is_due_though_its_request_gave_way_to_another(model, prompts):
    steps = itertools.count()  # a step takes a second on this clock
    front = EngineFront(
        Engine(model, max_batch_size=1, max_queue=8), batches_per_s=1e-6, longest_pause_s=3.0,
        clock=lambda: float(next(steps)),
    )  # fmt: skip
    step, numbers = front._engine.step, itertools.count()
    came: list[tuple[str, int]] = []

    async def read(name, prompt, *, priority):
        sampling = Sampling(max_tokens=12, ignore_eos=True)
        async with aclosing(front.batches(prompt, sampling, priority=priority)) as batches:
            async for batch in batches:
                came.append((name, len(batch)))

    async def main():
        loop, third = asyncio.get_running_loop(), asyncio.Event()

        def step_with_another():
            if next(numbers) == 3:  # two tokens are held back, and due in this step
                loop.call_soon_threadsafe(third.set)
                while not front._inbox:
                    time.sleep(0.001)
                front._empty_inbox()
            return step()

        front._engine.step = step_with_another
        first = asyncio.create_task(read("first", prompts[0], priority=5))
        await third.wait()
        await read("urgent", prompts[1], priority=1)
        await first

    try:
        asyncio.run(main())
        assert front.stats().preemptions == 1
        urgent = [number for number, (name, _) in enumerate(came) if name == "urgent"]
        assert came[: urgent[-1]].count(("first", 1)) == 1 and ("first", 2) in came[: urgent[-1]]
        assert sum(size for name, size in came if name == "first") == 12
    finally:
        front.shutdown()


def test_a_failure_comes_after_the_events_that_were_held_back_before_it(model, prompts):
    front = EngineFront(Engine(model, max_batch_size=4), batches_per_s=1e-6, longest_pause_s=1e6)
    step, steps = front._engine.step, itertools.count()

    def failing_step():
        if next(steps) == 4:
            raise RuntimeError("out of something")
        return step()

    async def main():
        sizes = []
        front._engine.step = failing_step
        with pytest.raises(GenerationFailed, match="out of something"):
            async with aclosing(front.batches(prompts[0], Sampling(max_tokens=30, ignore_eos=True))) as batches:
                async for batch in batches:
                    sizes.append(len(batch))
        return sizes

    try:
        sizes = asyncio.run(main())
        assert sizes[0] == 1 and len(sizes) == 2 and sum(sizes) in (3, 4)
    finally:
        front.shutdown()


def test_a_closed_event_loop_does_not_disturb_the_engine(front, model, prompts):
    slow_down(front)

    async def start_and_leave():
        events = front.generate(prompts[0], Sampling(max_tokens=40))
        await anext(events)
        return events  # never closed: its loop is gone before it ends

    loop = asyncio.new_event_loop()
    loop.run_until_complete(start_and_leave())
    loop.close()
    assert asyncio.run(tokens_of(front, prompts[2], Sampling(max_tokens=5))) == alone(
        model, prompts[2], Sampling(max_tokens=5)
    )


def test_shutdown_ends_open_calls_and_refuses_new_ones(front, prompts):
    slow_down(front, 0.05)

    async def main():
        call = asyncio.create_task(tokens_of(front, prompts[0], Sampling(max_tokens=40)))
        await until(lambda: front.stats().running == 1)
        await asyncio.to_thread(front.shutdown)
        with pytest.raises(EngineStopped):
            await call
        with pytest.raises(EngineStopped):
            await tokens_of(front, prompts[0], Sampling(max_tokens=1))

    asyncio.run(main())
    assert not front.is_alive
