import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from app.engine.sampling import Sampling, sample

# probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625 for tokens 3, 0, 4, 1, 2
LOGITS = torch.tensor([0.25, 0.0625, 0.0625, 0.5, 0.125]).log()


@dataclass
class Row:
    sampling: Sampling
    stream: random.Random
    prompt: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)


def draw(sampling: Sampling, num: int = 4000, **tokens: list[int]) -> Counter:
    row = Row(sampling, random.Random(0), **tokens)
    return Counter(choice.token for choice in sample(LOGITS.repeat(num, 1), [row] * num))


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"n": 0},
        {"temperature": -1},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"stop": ("",)},
        {"logprobs": 101},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**({"max_tokens": 1} | wrong))


def test_a_top_k_beyond_any_integer_type_is_no_limit():
    assert len(draw(Sampling(max_tokens=1, temperature=1.0, top_k=10**30))) == 5


def test_min_p_keeps_those_of_a_share_of_the_likeliest_ones_probability():
    assert set(draw(Sampling(max_tokens=1, temperature=1.0, min_p=0.3))) == {3, 0}
    assert set(draw(Sampling(max_tokens=1, temperature=1.0, min_p=0.3, top_k=4))) == {3, 0}
    assert set(draw(Sampling(max_tokens=1, temperature=1.0, min_p=1.0))) == {3}


def test_a_bias_can_force_and_forbid_a_token():
    assert draw(Sampling(max_tokens=1, logit_bias={2: 100.0})) == {2: 4000}
    assert 3 not in draw(Sampling(max_tokens=1, temperature=1.0, logit_bias={3: -100.0}))


def test_presence_and_frequency_lower_what_the_answer_holds():
    once, often = Sampling(max_tokens=1, presence_penalty=0.75), Sampling(max_tokens=1, frequency_penalty=0.25)
    assert draw(once, answer=[3]) == {0: 4000}
    assert draw(once, prompt=[3]) == {3: 4000}, "the prompt does not count"
    assert draw(often, answer=[3, 3]) == {3: 4000}
    assert draw(often, answer=[3, 3, 3]) == {0: 4000}


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return 4 * torch.randn(60, 3000, generator=torch.Generator().manual_seed(0))


def kept_by(logits: torch.Tensor, sampling: Sampling) -> list[set[int]]:
    """The tokens that each row can draw: found at every thousandth of the mass."""

    class Fixed(random.Random):
        value = 0.0

        def random(self) -> float:
            return self.value

    kept: list[set[int]] = [set() for _ in logits]
    for first in range(0, 1000, 50):  # so many draws in one step
        rows = []
        for part in range(first, first + 50):
            stream = Fixed()
            stream.value = part / 1000
            rows += [Row(sampling, stream)] * len(logits)
        for number, choice in enumerate(sample(logits.repeat(50, 1), rows)):
            kept[number % len(logits)].add(choice.token)
    return kept


@pytest.mark.parametrize(
    ("sampling", "warper"),
    [
        ({"top_k": 7}, lambda: TopKLogitsWarper(7)),
        ({"top_p": 0.6}, lambda: TopPLogitsWarper(0.6)),
        ({"min_p": 0.1}, lambda: MinPLogitsWarper(0.1)),
    ],
)
def test_what_can_be_drawn_is_what_transformers_leaves(logits, sampling, warper):
    logits = logits[:20]
    left = warper()(torch.zeros(len(logits), 1, dtype=torch.long), logits.clone())
    for row, tokens in enumerate(kept_by(logits, Sampling(max_tokens=1, temperature=1.0, **sampling))):
        allowed = set(left[row].isfinite().nonzero().flatten().tolist())
        probable = set((left[row].softmax(dim=-1) > 0.0011).nonzero().flatten().tolist())
        assert probable <= tokens <= allowed


def test_a_nucleus_larger_than_the_ordered_candidates_is_whole():
    flat = torch.zeros(1, 5000)
    row = Row(Sampling(max_tokens=1, temperature=1.0, top_p=0.999), random.Random(1))
    drawn = {sample(flat.clone(), [row])[0].token for _ in range(300)}
    assert max(drawn) > 4000 and len(drawn) > 250


def test_a_rows_token_does_not_depend_on_what_is_asked_for_beside_it(logits):
    asked = [
        {"top_k": 5}, {"top_p": 0.7}, {"top_k": 900, "top_p": 0.9}, {"top_p": 0.999, "min_p": 0.001},
        {"top_p": 0.99999}, {"min_p": 0.1}, {},
    ]  # fmt: skip
    flat = torch.cat([logits, torch.zeros(2, logits.shape[1])])  # whose nucleus is larger than the candidates
    samplings = [Sampling(max_tokens=1, temperature=1.3, **values) for values in asked]
    rows = [(number % len(flat), samplings[number % len(samplings)]) for number in range(3 * len(flat))]
    together = sample(flat[[row for row, _ in rows]], [Row(s, random.Random(n)) for n, (_, s) in enumerate(rows)])
    alone = [sample(flat[[row]], [Row(s, random.Random(n))])[0] for n, (row, s) in enumerate(rows)]
    assert together == alone


def test_repetition_penalty_is_that_of_transformers(logits):
    ids = torch.randint(0, 3000, (len(logits), 40), generator=torch.Generator().manual_seed(1))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone()).argmax(dim=-1).tolist()
    sampling = Sampling(max_tokens=1, repetition_penalty=1.7)
    rows = [Row(sampling, random.Random(0), row[:25].tolist(), row[25:].tolist()) for row in ids]
    assert [choice.token for choice in sample(logits.clone(), rows)] == expected
    likeliest = logits.argmax(dim=-1)
    rows = [Row(sampling, random.Random(0), [token]) for token in likeliest.tolist()]
    changed = [choice.token for choice in sample(logits.clone(), rows)]
    assert changed != likeliest.tolist()
