import random

import pytest

from app.engine.engine import Engine
from app.engine.sampling import Sampling
from app.engine.step_time import AnswerLength, StepTime


def test_the_line_through_the_steps_is_found_in_noise() -> None:
    draw, line = random.Random(0), StepTime()
    for _ in range(5000):
        answers = draw.randint(3, 20)
        line.observe(answers, (0.009 + 0.0005 * answers) * draw.uniform(0.8, 1.2))
    assert line.fixed_s == pytest.approx(0.009, rel=0.05) and line.answer_s == pytest.approx(0.0005, rel=0.1)


def test_steps_alike_say_nothing_of_an_answer() -> None:
    line = StepTime()
    assert (line.fixed_s, line.answer_s) == (0, 0)
    for _ in range(100):
        line.observe(4, 0.02)
    assert line.fixed_s == pytest.approx(0.02) and line.answer_s == pytest.approx(0, abs=1e-9)


def test_neither_part_is_negative() -> None:
    faster, dearer = StepTime(), StepTime()
    for answers in (1, 2, 4, 8):
        faster.observe(answers, 0.1 / answers)
        dearer.observe(answers, 0.001 * answers**2)
    assert faster.answer_s == 0 and faster.fixed_s > 0
    assert dearer.fixed_s == 0 and dearer.answer_s > 0


def test_what_is_long_ago_is_forgotten() -> None:
    line = StepTime()
    line.observe(2, 0.5, steps=100)
    for answers in (2, 8) * 8000:
        line.observe(answers, 0.1 + 0.01 * answers)
    assert line.fixed_s == pytest.approx(0.1, rel=0.02) and line.answer_s == pytest.approx(0.01, rel=0.05)


def test_an_engine_tells_of_its_steps(model) -> None:
    engine = Engine(model, max_batch_size=4)
    assert engine.stats().fixed_s == engine.stats().answer_s == 0
    for length in (3, 6, 9, 12):
        engine.add_request([1, 2, 3], Sampling(max_tokens=length, ignore_eos=True))
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert stats.fixed_s + stats.answer_s > 0 and stats.queued_s == 0
    for _ in range(6):
        engine.add_request([1, 2, 3], Sampling(max_tokens=50, ignore_eos=True))
    full_s = stats.fixed_s + 4 * stats.answer_s
    assert engine.stats().queued_s == pytest.approx(6 * 7.5 * full_s / 4, rel=0.1), "the last ones had 7.5 tokens"


def test_before_any_answer_has_ended_what_waits_is_what_it_may_take(model) -> None:
    engine = Engine(model, max_batch_size=1)
    for _ in range(2):
        engine.add_request([1, 2, 3], Sampling(max_tokens=10, ignore_eos=True))
    engine.step()
    stats = engine.stats()
    assert stats.queued_s == pytest.approx(13 * (stats.fixed_s + stats.answer_s))


def test_the_length_of_answers_follows_the_last_dozens() -> None:
    length = AnswerLength()
    assert length.mean is None
    for tokens in [10] * 5 + [100] * 500:
        length.observe(tokens)
    assert length.mean == pytest.approx(100, rel=0.01)
