"""Tokens to text, one at a time: whole characters only, and nothing past a stop string. Knows no models."""

from collections.abc import Sequence

from app.data.tokenization import Tokenizer

_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one answer; what `push` and `finish` return, joined, is the decoded whole up to the stop string."""

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._undecoded: list[int] = []
        self._held = ""
        self.stopped = False
        """A stop string was met; it and what follows are dropped."""

    def push(self, token: int) -> str:
        """The text that `token` makes certain; often empty."""
        self._undecoded.append(token)
        text = self._tokenizer.decode(self._undecoded)
        if text.endswith(_INCOMPLETE):  # a character whose other bytes are in tokens to come
            return ""
        self._undecoded.clear()
        return self._release(text)

    def finish(self) -> str:
        """What was held back for tokens that do not come."""
        text = self._release(self._tokenizer.decode(self._undecoded)) if self._undecoded else ""
        self._undecoded.clear()
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = len(text) - self._overlap(text)
        self._held = text[keep:]
        return text[:keep]

    def _overlap(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stop)), 0)
