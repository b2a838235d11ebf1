"""How long a step takes by how many answers run, and how long answers are: what tells how much of its speed an engine
already gives, and how long others will wait."""

_MEMORY_S, _MEMORY_ANSWERS = 300.0, 50
_RIDGE = 1e-3
"""Of the squared mean: where hardly any step differs from another, they say nothing of what an answer takes."""


class StepTime:
    """A line through the steps of the last five minutes of work: seconds = `fixed_s` + `answer_s` · answers.

    Prompts are part of it: in the long run each answer has its share of them.
    """

    def __init__(self) -> None:
        self._steps = self._answers = self._seconds = self._squares = self._products = 0.0

    def observe(self, answers: int, seconds: float, *, steps: int = 1) -> None:
        """`steps` of them took `seconds` each, while so many answers were running."""
        keep = max(0.0, 1 - steps * seconds / _MEMORY_S)
        self._steps = keep * self._steps + steps
        self._answers = keep * self._answers + steps * answers
        self._seconds = keep * self._seconds + steps * seconds
        self._squares = keep * self._squares + steps * answers * answers
        self._products = keep * self._products + steps * answers * seconds

    @property
    def answer_s(self) -> float:
        """What one more answer adds to a step; 0 before the first."""
        if not self._answers:
            return 0.0
        answers, seconds = self._answers / self._steps, self._seconds / self._steps
        variance = self._squares / self._steps - answers * answers
        covariance = self._products / self._steps - answers * seconds
        return min(max(0.0, covariance / (variance + _RIDGE * answers * answers)), seconds / answers)

    @property
    def fixed_s(self) -> float:
        """What it takes whatever their number."""
        return (self._seconds - self.answer_s * self._answers) / self._steps if self._steps else 0.0


class AnswerLength:
    """The mean of the last dozens that came to their end, in tokens."""

    def __init__(self) -> None:
        self.mean: float | None = None
        self._count = 0

    def observe(self, tokens: int) -> None:
        self._count = min(self._count + 1, _MEMORY_ANSWERS)
        before = self.mean or 0.0
        self.mean = before + (tokens - before) / self._count


def queued_s(line: StepTime, length: AnswerLength, *, waiting: int, queued_tokens: int, places: int) -> float:
    """Seconds that full batches of so many `places` would need for the `waiting` answers, if they are as long as the
    last ones were; before any has ended, for all tokens that they may take."""
    tokens = queued_tokens if length.mean is None else waiting * length.mean
    return tokens / places * (line.fixed_s + line.answer_s * places)
