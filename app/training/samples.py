"""Answers to a few held-out prompts by the model before training and after it: what a loss does not show.

OUTPUT/samples.json holds them; a resumed run keeps those from before its first step.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from app.atomic import write_text
from app.config.schema import TrainConfig
from app.data.shards import Manifest
from app.data.tokenization import load_tokenizer
from app.models.decoder import Decoder
from app.training.answers import answer, first_exchanges

_FILE = "samples.json"
MAX_TOKENS = 80


@dataclass(frozen=True)
class BeforeAndAfter:
    prompt: str
    reference: str
    before: str
    """Greedy, by the base model."""
    after: str | None = None
    """None until training has ended."""


def sample_before(model: Decoder, config: TrainConfig, manifest: Manifest, *, folder: Path) -> None:
    """Write the answers of `model`, which no technique has touched; those that are there stay."""
    if config.samples and not (Path(config.output) / _FILE).exists():
        answers = _answers(model, config, manifest, folder=folder)
        _write(config, [BeforeAndAfter(prompt, reference, answer) for prompt, reference, answer in answers])


def sample_after(model: Decoder, config: TrainConfig, manifest: Manifest, *, folder: Path) -> None:
    """Add the answers of the trained `model`, which ends in evaluation mode."""
    if config.samples:
        answers = _answers(model, config, manifest, folder=folder)
        pairs = zip(read_samples(Path(config.output)), answers, strict=True)
        _write(config, [BeforeAndAfter(old.prompt, old.reference, old.before, new) for old, (_, _, new) in pairs])


def read_samples(output: Path) -> list[BeforeAndAfter]:
    """None of them where the run has no such file."""
    file = output / _FILE
    return [BeforeAndAfter(**sample) for sample in json.loads(file.read_text())] if file.exists() else []


def _answers(model: Decoder, config: TrainConfig, manifest: Manifest, *, folder: Path) -> list[tuple[str, str, str]]:
    """Prompt, reference and greedy answer, by the model in memory; `folder` has its tokenizer."""
    exchanges = first_exchanges(manifest, "validation", config.samples)
    answered = answer(model, load_tokenizer(folder), exchanges, max_tokens=MAX_TOKENS) if exchanges else []
    return [(sample.prompt, sample.reference, sample.answer) for sample in answered]


def _write(config: TrainConfig, samples: list[BeforeAndAfter]) -> None:
    text = json.dumps([asdict(sample) for sample in samples], indent=2, ensure_ascii=False)
    write_text(Path(config.output) / _FILE, text + "\n")
