"""One example: what is asked, what it is asked about, and the right answer."""

from dataclasses import asdict, dataclass

NOT_SAID = "The text does not say."


@dataclass(frozen=True)
class Record:
    instruction: str
    input: str
    output: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)
