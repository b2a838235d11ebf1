import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from single import alone, collect, drain

from app.engine.engine import Engine
from app.engine.events import ContextLengthExceeded, InvalidRequest, QueueFull
from app.engine.kv_cache import KVCache
from app.engine.sampling import Sampling
from app.errors import UserError
from app.models.decoder import Decoder, DecoderConfig

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


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(model, prompts):
    engine = Engine(model, max_batch_size=3, max_queue=8, max_step_tokens=1)  # raised to 3 + 16
    first, second = (engine.add_request(ids, Sampling(max_tokens=12)) for ids in (prompts[1], prompts[4]))
    tokens, reasons = {}, {}
    collect(engine.step(), tokens, reasons)
    long = engine.add_request(prompts[3] + prompts[0], Sampling(max_tokens=8))
    before = engine.stats().computed_tokens
    for _ in range(2):  # 35 tokens: 17 beside the other two, then 17, and the last one in a third step
        events = engine.step()
        assert {event.request_id for event in events} == {first, second}
        assert engine.stats().computed_tokens - before == 19
        before = engine.stats().computed_tokens
        collect(events, tokens, reasons)
    events = engine.step()
    assert {event.request_id for event in events} == {first, second, long}
    collect(events, tokens, reasons)
    while engine.has_work:
        collect(engine.step(), tokens, reasons)
    assert tokens[long] == alone(model, prompts[3] + prompts[0], Sampling(max_tokens=8))
    assert tokens[first] == alone(model, prompts[1], Sampling(max_tokens=12))


def test_a_bound_on_queued_tokens_refuses_the_next_request_and_recovers(model, prompts):
    engine = Engine(model, max_batch_size=1, max_queue=100, max_queued_tokens=40)
    for _ in range(2):
        engine.add_request(prompts[0], Sampling(max_tokens=10))
        engine.step()
    engine.add_request(prompts[0], Sampling(max_tokens=10))
    assert engine.stats().queued_tokens == 30
    with pytest.raises(QueueFull, match="max_queued_tokens=40"):
        engine.add_request(prompts[0], Sampling(max_tokens=10))
    drain(engine)
    assert engine.stats().queued_tokens == 0
    engine.add_request(prompts[0], Sampling(max_tokens=40))


def test_the_bound_on_queued_tokens_is_of_those_whom_no_slot_takes(model, prompts):
    engine = Engine(model, max_batch_size=3, max_queue=100, max_queued_tokens=40)
    fifteen = Sampling(max_tokens=10)
    for _ in range(5):  # three for the free slots, two that wait, and no step between them
        engine.add_request(prompts[0], fifteen)
    with pytest.raises(QueueFull, match="30 tokens are waiting already"):
        engine.add_request(prompts[0], fifteen)
    tokens, _ = drain(engine)
    assert len(tokens) == 5
    engine.add_request(prompts[0], replace(fifteen, n=4))


@pytest.mark.parametrize(("dtype", "kv_dtype", "rows"), [("bfloat16", "int8", 64), ("float32", "bf16", 40)])
def test_a_long_prompts_rows_are_filled_up_where_the_products_are_in_bf16(model, monkeypatch, dtype, kv_dtype, rows):
    """Whatever the cache is in: it is torch's products in bf16 that are compiled for each number of rows."""
    attention, shapes = F.scaled_dot_product_attention, []

    def seen(q, *args, **kwargs):
        shapes.append(q.shape[2])
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    halved = copy.deepcopy(model).to(getattr(torch, dtype))
    engine = Engine(halved, kernels="torch", kv_dtype=kv_dtype)
    engine.add_request([3] * 40, Sampling(max_tokens=1))
    engine.step()
    assert shapes == [rows] * 3


def test_smaller_priorities_go_first_and_take_the_place_of_larger_ones(model, prompts):
    engine = Engine(model, max_batch_size=1, max_queue=8)
    low = engine.add_request(prompts[0], Sampling(max_tokens=12), priority=5)
    engine.step()
    later = engine.add_request(prompts[1], Sampling(max_tokens=4), priority=5)
    urgent = engine.add_request(prompts[2], Sampling(max_tokens=6), priority=1)
    tokens, reasons = {low: [None]}, {}
    order = []
    while engine.has_work:
        events = engine.step()
        collect(events, tokens, reasons)
        order += [event.request_id for event in events if event.finish_reason]
    assert order == [urgent, low, later]
    assert engine.stats().preemptions == 1
    assert tokens[low][1:] == alone(model, prompts[0], Sampling(max_tokens=12))[1:], "it went on where it was"
    assert tokens[urgent] == alone(model, prompts[2], Sampling(max_tokens=6))


def test_n_answers_share_the_prompt_and_draw_for_themselves(model, prompts):
    sampling = Sampling(max_tokens=10, temperature=1.5, seed=3)
    engine = Engine(model, max_batch_size=4, max_queue=8)
    request_id = engine.add_request(prompts[3], replace(sampling, n=3))
    answers, finished = {0: [], 1: [], 2: []}, []
    while engine.has_work:
        for event in engine.step():
            assert event.request_id == request_id
            answers[event.index].append(event.token)
            finished += [event.index] if event.finish_reason else []
    assert sorted(finished) == [0, 1, 2]
    assert answers[0] == alone(model, prompts[3], sampling)
    assert len({tuple(answer) for answer in answers.values()}) == 3
    assert engine.stats().reused_tokens == 2 * 16, "the prompt's full block, by the other two"
    engine.add_request(prompts[3], replace(sampling, n=3))
    again = {0: [], 1: [], 2: []}
    while engine.has_work:
        for event in engine.step():
            again[event.index].append(event.token)
    assert again == answers


def test_an_abort_ends_all_answers_of_a_request(model, prompts):
    engine = Engine(model, max_batch_size=2, max_queue=8)
    request_id = engine.add_request(prompts[3], Sampling(max_tokens=10, n=4))
    engine.step()
    engine.step()
    assert engine.abort(request_id) and not engine.has_work
    assert engine.stats().free_blocks == engine.stats().blocks and engine.stats().queued_tokens == 0


def test_a_stop_text_that_spans_tokens_ends_the_answer_with_the_token_that_completes_it(model, prompts):
    free = alone(model, prompts[0], Sampling(max_tokens=12))
    words = [f"<{token}>".encode() for token in range(VOCAB_SIZE)]
    engine = Engine(model, token_bytes=words)
    stop = f"{free[4]}><{free[5]}"
    assert all(stop not in f"{free[i]}><{free[i + 1]}" for i in range(4))
    request_id = engine.add_request(prompts[0], Sampling(max_tokens=12, stop=("never", stop)))
    events = []
    while engine.has_work:
        events += engine.step()
    assert [event.token for event in events] == free[:6]
    assert (events[-1].finish_reason, events[-1].stop) == ("stop", stop)
    assert all(event.request_id == request_id for event in events)
    with pytest.raises(InvalidRequest, match="does not know its tokens' texts"):
        Engine(model).add_request(prompts[0], Sampling(max_tokens=2, stop=("x",)))


def test_the_end_token_ends_an_answer_unless_it_is_ignored(model, prompts):
    free = alone(model, prompts[0], Sampling(max_tokens=12))
    end = free[6]
    assert alone(model, prompts[0], Sampling(max_tokens=12, end_id=end)) == free[: free.index(end)]
    assert alone(model, prompts[0], Sampling(max_tokens=12, end_id=end, ignore_eos=True)) == free


def test_logprobs_are_the_models_own(model, reference, prompts):
    engine = Engine(model)
    biased = Sampling(max_tokens=4, logprobs=3, logit_bias={5: 1000.0})
    engine.add_request(prompts[2], biased)
    ids = list(prompts[2])
    while engine.has_work:
        (event,) = engine.step()
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
        assert event.token == 5
        assert event.logprob == pytest.approx(expected[5].item(), abs=1e-3)
        values, likeliest = expected.topk(3)
        assert [token for token, _ in event.top_logprobs] == likeliest.tolist()
        assert [value for _, value in event.top_logprobs] == pytest.approx(values.tolist(), abs=1e-3)
        ids.append(event.token)


def test_settings_that_hold_nothing_are_refused(model):
    with pytest.raises(ValueError, match="max_batch_size=0"):
        Engine(model, max_batch_size=0)
    with pytest.raises(UserError, match="max_kv_bytes=100 holds no block of 16 tokens"):
        Engine(model, max_kv_bytes=100)
    odd = Decoder(DecoderConfig(VOCAB_SIZE, CONTEXT_LENGTH, num_layers=1, num_heads=2, width=12, mlp_width=8))
    with pytest.raises(UserError, match="kv_dtype: int8 is for heads.* are 6; take bf16"):
        Engine(odd, kv_dtype="int8")


def test_a_request_that_the_cache_could_never_hold_is_refused(model, prompts):
    block = KVCache.block_bytes(model.config, num_extra_layers=1, dtype=torch.float32)
    engine = Engine(model, max_kv_bytes=2 * block + 5)
    assert engine.stats().blocks == 2
    with pytest.raises(InvalidRequest, match="the KV cache holds 32 in all.*max_kv_bytes"):
        engine.add_request(prompts[3], Sampling(max_tokens=3))
    engine.add_request(prompts[3], Sampling(max_tokens=2))


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
