"""ROUGE-L and exact match of answers. The expected ROUGE-L are `rouge-score` 0.1.2's, which is no longer maintained."""

import pytest

from app.training.answer_scores import is_exact_match, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 0.75),  # Lin's own example: 3 of 4 words, in order
        ("the gunman police kill", "police killed the gunman", 0.5),
        ("The capital of France is Paris.", "Paris is the capital of France.", 0.666667),
        ("It's 3.5 kg, well-known (really)!", "its 3.5kg well known", 0.461538),
        ("a b c d e f g", "g f e d c b a", 0.142857),
        ("one two two three three three", "three two one two three", 0.545455),
        (
            "An alpaca eats grass and hay; it needs clean water every day.",
            "Alpacas eat grass and hay, and they need clean water each day.",
            0.5,
        ),
        ("", "something", 0.0),
        ("...", "something", 0.0),
    ],
)
def test_rouge_l_is_that_of_rouge_score(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-6)
    assert rouge_l(reference, answer) == rouge_l(answer, reference)


def test_letters_of_any_script_are_words() -> None:
    assert rouge_l("Здравствуй, мир!", "здравствуй мир") == 1.0
    assert not is_exact_match("Здравствуй", "мир")


def test_an_exact_match_overlooks_case_punctuation_and_white_space_alone() -> None:
    assert is_exact_match(" The answer is\n42. ", "the answer is 42")
    assert not is_exact_match("The answer is 42", "answer is 42")
    assert not is_exact_match("3.14", "314")
    assert not is_exact_match("", "42")


def test_references_without_words_match_by_their_signs() -> None:
    assert is_exact_match("+ ", "+")
    assert not is_exact_match("-", "+")
