"""How near an answer comes to its reference: ROUGE-L (Lin 2004, aclanthology.org/W04-1013) and exact match.

Both see words alone, as `rouge-score` and SQuAD's exact match (Rajpurkar et al. 2016, arXiv:1606.05250) do: letters
and digits in lower case, with punctuation and white space between them. Unlike these, letters of any script count, and
English articles are kept.
"""

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def rouge_l(answer: str, reference: str) -> float:
    """F-measure, from 0 to 1, of the words that both have in the same order; recall and precision weigh the same."""
    mine, theirs = words(answer), words(reference)
    common = _longest_common_subsequence(mine, theirs)
    return 2 * common / (len(mine) + len(theirs)) if common else 0.0


def is_exact_match(answer: str, reference: str) -> bool:
    """Whether both are the same words; where neither has any, the same signs."""
    return words(answer) == words(reference) if words(reference) else answer.strip() == reference.strip()


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Its length, by the textbook's recurrence, a row of the table at a time."""
    above = [0] * (len(right) + 1)
    for word in left:
        row = [0]
        for column, other in enumerate(right, start=1):
            row.append(above[column - 1] + 1 if word == other else max(above[column], row[-1]))
        above = row
    return above[-1]
