"""Settings of documents: how files are read, and how texts are cut."""

from typing import Annotated

from pydantic import Field, model_validator

from app.config.base import Config, Positive


class ReadingConfig(Config):
    """What a file may cost; one that needs more is refused. HTML and PDF are read in a process apart."""

    max_characters: Positive = 5_000_000
    """Of a document's text."""
    max_pages: Positive = 2000
    """Of a PDF."""
    max_memory_bytes: Positive = 2**30
    """Of the process that reads an HTML or PDF file."""
    timeout_s: Annotated[float, Field(gt=0)] = 30
    """For reading an HTML or PDF file."""


class ChunkingConfig(Config):
    chunk_words: Annotated[int, Field(ge=10)] = 90
    """Of a passage, at most."""
    overlap_words: Annotated[int, Field(ge=0)] = 20
    """That a passage repeats of the one before."""

    @model_validator(mode="after")
    def _check_overlap(self) -> "ChunkingConfig":
        if self.overlap_words >= self.chunk_words:
            raise ValueError(f"overlap_words={self.overlap_words} must be less than chunk_words={self.chunk_words}")
        return self
