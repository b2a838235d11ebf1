import pytest
import torch
from single import alone, collect, drain

from app.engine.engine import Engine
from app.engine.sampling import Sampling
from app.engine.sequence import ContextLengthExceeded, InvalidRequest, QueueFull

CONTEXT_LENGTH = 48
VOCAB_SIZE = 97


def reference_greedy(reference, ids, max_tokens):
    output = reference.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=max_tokens, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(ids) :].tolist()


def test_batched_greedy_equals_one_at_a_time_and_transformers(model, reference, prompts):
    engine = Engine(model, max_batch_size=len(prompts), max_queue=8)
    sampling = Sampling(max_tokens=15)
    request_ids = [engine.add_request(ids, sampling) for ids in prompts]
    tokens, reasons = drain(engine)
    for request_id, ids in zip(request_ids, prompts, strict=True):
        assert tokens[request_id] == alone(model, ids, sampling)
        assert tokens[request_id] == reference_greedy(reference, ids, 15)
        assert len(set(tokens[request_id])) > 3, "a model that repeats one token proves nothing"
    assert set(reasons.values()) == {"length"}


def test_a_request_joins_while_others_decode_and_changes_nothing(model, prompts):
    engine = Engine(model, max_batch_size=3, max_queue=8)
    tokens, reasons, request_ids = {}, {}, []
    for index, ids in enumerate(prompts):
        request_ids.append(engine.add_request(ids, Sampling(max_tokens=5 + 2 * index)))
        collect(engine.step(), tokens, reasons)
        assert engine.stats().running <= 3
    rest, more = drain(engine)
    for request_id in request_ids:
        tokens.setdefault(request_id, []).extend(rest.get(request_id, []))
    for index, (request_id, ids) in enumerate(zip(request_ids, prompts, strict=True)):
        assert tokens[request_id] == alone(model, ids, Sampling(max_tokens=5 + 2 * index))
    assert len(reasons | more) == len(prompts)


def test_each_step_computes_only_new_tokens(model, prompts):
    engine = Engine(model, max_batch_size=2, max_queue=8)
    engine.add_request(prompts[0], Sampling(max_tokens=10))
    engine.add_request(prompts[2], Sampling(max_tokens=10))
    engine.step()
    assert engine.stats().computed_tokens == len(prompts[0]) + len(prompts[2])
    for step in range(1, 4):
        engine.step()
        assert engine.stats().computed_tokens == len(prompts[0]) + len(prompts[2]) + 2 * step


def test_a_stop_token_ends_the_request_and_is_not_delivered(model, prompts):
    free = alone(model, prompts[0], Sampling(max_tokens=12))
    stop = free[6]
    engine = Engine(model, max_batch_size=1, max_queue=1)
    request_id = engine.add_request(prompts[0], Sampling(max_tokens=12, stop_ids=frozenset({stop})))
    tokens, reasons = drain(engine)
    assert tokens[request_id] == free[: free.index(stop)]
    assert reasons[request_id] == "stop"
    assert engine.stats().free_slots == 1


def test_max_tokens_is_cut_to_what_the_context_holds(model, reference, prompts):
    ids = prompts[3]
    tokens = alone(model, ids, Sampling(max_tokens=1000))
    assert len(tokens) == CONTEXT_LENGTH - len(ids)
    assert tokens == reference_greedy(reference, ids, CONTEXT_LENGTH - len(ids))


def test_the_longest_prompt_that_fits_gives_one_token_and_a_longer_one_is_refused(model):
    assert len(alone(model, [3] * (CONTEXT_LENGTH - 1), Sampling(max_tokens=5))) == 1
    engine = Engine(model, max_batch_size=1, max_queue=1)
    with pytest.raises(ContextLengthExceeded, match=f"{CONTEXT_LENGTH} tokens.*context of {CONTEXT_LENGTH}"):
        engine.add_request([3] * CONTEXT_LENGTH, Sampling(max_tokens=1))


@pytest.mark.parametrize("ids", [[], [VOCAB_SIZE], [4, -1]])
def test_an_impossible_prompt_is_refused(model, ids):
    engine = Engine(model, max_batch_size=1, max_queue=1)
    with pytest.raises(InvalidRequest):
        engine.add_request(ids, Sampling(max_tokens=1))
    assert not engine.has_work


def test_a_full_queue_refuses_the_next_request_and_recovers(model, prompts):
    engine = Engine(model, max_batch_size=2, max_queue=3)
    for _ in range(5):  # two for the free slots, three that wait
        engine.add_request(prompts[0], Sampling(max_tokens=4))
    with pytest.raises(QueueFull, match="max_queue=3"):
        engine.add_request(prompts[0], Sampling(max_tokens=4))
    tokens, _ = drain(engine)
    assert len(tokens) == 5
    engine.add_request(prompts[0], Sampling(max_tokens=4))


def test_an_abort_frees_the_slot_and_others_go_on(model, prompts):
    engine = Engine(model, max_batch_size=2, max_queue=8)
    sampling = Sampling(max_tokens=14)
    kept, dropped, waiting, dropped_waiting = [engine.add_request(ids, sampling) for ids in prompts[:4]]
    tokens, reasons = {}, {}
    for _ in range(3):
        collect(engine.step(), tokens, reasons)
    assert engine.abort(dropped) and engine.abort(dropped_waiting)
    assert engine.stats().free_slots == 1 and engine.stats().waiting == 1
    assert not engine.abort(dropped), "a second abort finds nothing"
    while engine.has_work:
        collect(engine.step(), tokens, reasons)
    assert tokens[kept] == alone(model, prompts[0], sampling)
    assert tokens[waiting] == alone(model, prompts[2], sampling), "the slot's old keys must not be seen"
    assert len(tokens[dropped]) == 3 and dropped_waiting not in tokens
    assert engine.stats().free_slots == 2


def test_long_prompts_join_over_several_steps(model, prompts):
    engine = Engine(model, max_batch_size=4, max_queue=8)
    engine._scheduler.max_prefill_tokens = 40
    for _ in range(3):
        engine.add_request(prompts[3], Sampling(max_tokens=8))
    running = []
    for _ in range(3):
        engine.step()
        running.append(engine.stats().running)
    assert running == [1, 2, 3]


def test_the_same_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(model, prompts):
    sampling = Sampling(max_tokens=20, temperature=1.5, top_k=30, top_p=0.95, seed=11)
    expected = alone(model, prompts[0], sampling)
    engine = Engine(model, max_batch_size=8, max_queue=8)
    engine.add_request(prompts[1], Sampling(max_tokens=30, temperature=1.0))
    engine.step()
    request_id = engine.add_request(prompts[0], sampling)
    engine.add_request(prompts[4], Sampling(max_tokens=9, temperature=0.7, seed=11))
    engine.add_request(prompts[5], Sampling(max_tokens=9))
    tokens, _ = drain(engine)
    assert tokens[request_id] == expected
    assert alone(model, prompts[0], Sampling(max_tokens=20, temperature=1.5, seed=12)) != expected
