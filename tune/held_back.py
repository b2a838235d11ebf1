"""OUTPUT/test.json: the winner on the test split, which no trial has been trained on or judged by.

Written once. It is not computed anew, whatever the sweep does after: the second look would be a choice.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from app.atomic import write_text
from app.config.schema import EvaluateConfig, TrainConfig, WorkersConfig
from app.data.shards import read_manifest
from app.training.evaluate import evaluate, plan_evaluation
from tune.records import TrialRecord

TEST_FILE = "test.json"


@dataclass(frozen=True)
class TestFigures:
    trial: int
    """Whose delta was evaluated."""
    records: int
    tokens: int
    """Of responses: those that the loss is over."""
    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float


def read_test(sweep: Path) -> TestFigures | None:
    file = sweep / TEST_FILE
    return TestFigures(**json.loads(file.read_text())) if file.exists() else None


def evaluate_winner(sweep: Path, winner: TrialRecord) -> TestFigures | None:
    """Evaluate what `winner` has made, unless that was done; Ray is initialised. None: its data has no test split.

    Raises:
        UserError: its data is gone, or its delta.
    """
    done = read_test(sweep)
    if done is not None or not read_manifest(winner.config.data).num_rows("test"):
        return done
    found = evaluate(plan_evaluation(_evaluation_of(winner.config)))[0]
    figures = TestFigures(winner.number, found.records, found.tokens, found.loss, found.perplexity, found.bits_per_byte)
    write_text(sweep / TEST_FILE, json.dumps(asdict(figures), indent=2) + "\n")
    return figures


def _evaluation_of(config: TrainConfig) -> EvaluateConfig:
    """As the run itself evaluates: with its precision, on a worker of its kind."""
    run, is_whole_model = Path(config.output), config.method.type == "full"
    workers = config.workers
    return EvaluateConfig(
        data=config.data,
        model=str(run / "model") if is_whole_model else config.model,
        delta=None if is_whole_model else str(run / "delta"),
        split="test",
        precision=config.precision,
        workers=WorkersConfig(count=1, cpus=workers.cpus, gpus=workers.gpus, threads=workers.threads),
        answers=0,
        samples=0,
    )
