"""What the processes of a run and of an application import: there are ten, and a user waits for each at every start."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "deepspeed",
    "mlflow",
    "matplotlib",
    "transformers",
    "sentence_transformers",
)


def imported_by(code: str) -> set[str]:
    script = f"import json, sys\n{code}\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import app.training.feeding, app.training.ending", set()),
        ("import app.training.fine_tuning", {"torch"}),
        (
            "import os; os.environ['DS_ACCELERATOR'] = 'cpu'\n"
            "from app.training.deepspeed import import_deepspeed\n"
            "import_deepspeed().zero\n"
            "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam",
            {"torch", "deepspeed"},
        ),
        ("import app.serving.ingress, app.serving.limiter, app.serving.retriever, app.serving.documents", set()),
        ("from app.retrieval.embedding import Embedder\nEmbedder().embed(['hay'])", set()),
    ],
    ids=[
        "the processes that deal out rows",
        "the driver and the controller",
        "a worker",
        "what serves but generators",
        "who embeds",
    ],
)
def test_a_process_imports_no_more_than_it_needs(code: str, expected: set[str]) -> None:
    assert imported_by(code) == expected


def test_mlflow_can_be_imported_after_deepspeed() -> None:
    after = "from app.training.deepspeed import import_deepspeed\nimport_deepspeed()\nimport mlflow"
    assert "mlflow" in imported_by(f"import os; os.environ['DS_ACCELERATOR'] = 'cpu'\n{after}")
