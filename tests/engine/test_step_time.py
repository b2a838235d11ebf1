import random

import pytest

from app.engine.engine import Engine
from app.engine.sampling import Sampling
from app.engine.step_time import StepTime


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
    assert engine.stats().fixed_s + engine.stats().answer_s > 0
