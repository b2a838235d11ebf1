import random
from collections import Counter

import pytest
import torch

from app.engine.sampling import Sampling, sample

# probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625 for tokens 3, 0, 4, 1, 2
LOGITS = torch.tensor([0.25, 0.0625, 0.0625, 0.5, 0.125]).log()


def draw(sampling: Sampling, num: int = 4000) -> Counter:
    stream = random.Random(0)
    return Counter(sample(LOGITS.repeat(num, 1), [sampling] * num, [stream] * num))


def test_temperature_zero_takes_the_likeliest_token():
    assert draw(Sampling(max_tokens=1)) == {3: 4000}


def test_draws_follow_the_distribution():
    counts = draw(Sampling(max_tokens=1, temperature=1.0))
    for token, probability in enumerate(LOGITS.exp().tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens_the_distribution():
    counts = draw(Sampling(max_tokens=1, temperature=0.5))
    squared = LOGITS.exp() ** 2 / (LOGITS.exp() ** 2).sum()
    assert counts[3] / 4000 == pytest.approx(squared[3].item(), abs=0.03)


def test_top_k_keeps_the_k_likeliest():
    counts = draw(Sampling(max_tokens=1, temperature=1.0, top_k=2))
    assert set(counts) == {3, 0}
    assert counts[3] / 4000 == pytest.approx(2 / 3, abs=0.03)


def test_top_p_keeps_the_smallest_set_that_holds_the_probability():
    assert set(draw(Sampling(max_tokens=1, temperature=1.0, top_p=0.7))) == {3, 0}
    assert set(draw(Sampling(max_tokens=1, temperature=1.0, top_p=0.8))) == {3, 0, 4}
    assert set(draw(Sampling(max_tokens=1, temperature=1.0, top_p=1e-6))) == {3}


def test_a_top_k_beyond_the_vocabulary_keeps_all():
    assert len(draw(Sampling(max_tokens=1, temperature=1.0, top_k=1000))) == 5


def test_a_tiny_temperature_does_not_overflow():
    assert draw(Sampling(max_tokens=1, temperature=1e-30)) == {3: 4000}


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**({"max_tokens": 1} | wrong))


def test_a_top_k_beyond_any_integer_type_is_no_limit():
    assert len(draw(Sampling(max_tokens=1, temperature=1.0, top_k=10**30))) == 5
