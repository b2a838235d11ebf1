"""Questions to be answered from an invented passage, and some that it leaves open."""

from collections.abc import Iterator
from random import Random

from instruction_kinds.passage_texts import PASSAGES, TEMPLATES, VALUES
from instruction_kinds.record import NOT_SAID, Record

FILLINGS_OF_EACH_TEMPLATE = 5


def passage_questions(rng: Random) -> Iterator[Record]:
    for passage, questions, _ in PASSAGES:
        for question, answer in questions:
            yield Record(question, passage, answer)


def filled_passage_questions(rng: Random) -> Iterator[Record]:
    """Each filled template is asked about twice, with different questions."""
    for template, questions, _ in TEMPLATES:
        for values in fillings(rng):
            for question, answer in rng.sample(questions, k=2):
                yield Record(question.format(**values), template.format(**values), answer.format(**values))


def unanswered_questions(rng: Random) -> Iterator[Record]:
    for passage, _, question in PASSAGES:
        if question:
            yield Record(question, passage, NOT_SAID)
    for template, _, question in TEMPLATES:
        values = next(fillings(rng))
        yield Record(question.format(**values), template.format(**values), NOT_SAID)


def fillings(rng: Random) -> Iterator[dict[str, str]]:
    """Values for the blanks of a template, different from one filling to the next."""
    shuffled = {key: rng.sample(values, k=FILLINGS_OF_EACH_TEMPLATE) for key, values in VALUES.items()}
    for i in range(FILLINGS_OF_EACH_TEMPLATE):
        yield {key: values[i] for key, values in shuffled.items()}
