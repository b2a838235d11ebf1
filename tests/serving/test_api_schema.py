"""Schemathesis reads /openapi.json and asks what it allows and what it does not: no 5xx, no answer that is not
documented, no valid request refused as invalid and no invalid one taken.

`make test` asks about 1,200 times, of a tiny model; `pytest --api-examples 120 tests/serving/test_api_schema.py` asks
more than 2,000 times, of the embedded base.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.config import ApplicationConfig
from tests.serving.local_application import served_here

pytestmark = pytest.mark.slow

CONFIG = """
[checks.positive_data_acceptance]
# 400: it has the documented form, and cannot be answered, such as a prompt that is longer than the context
# 409: a generated document has the name of an earlier one
expected-statuses = ["2xx", 400, 404, 409, 429]

[checks.negative_data_rejection]
expected-statuses = [400, 405, 413, 422]
"""


def test_the_api_is_what_its_schema_says(pytestconfig, tiny_model, index_dir, tmp_path):
    asked_for = pytestconfig.getoption("--api-examples")
    examples, model = (2, str(tiny_model)) if asked_for is None else (asked_for, "embedded")
    (tmp_path / "documents").mkdir()
    values = {
        "generator": {"model": model, "max_batch_size": 32, "threads": 1},
        "retriever": {"index": str(index_dir), "documents": str(tmp_path / "documents")},
    }
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    hooks = {"SCHEMATHESIS_HOOKS": "tests.serving.api_hooks", "PYTHONPATH": str(Path(__file__).parents[2])}
    with served_here(ApplicationConfig.model_validate(values)) as url:
        command = [
            Path(sys.executable).with_name("st"), "--config-file", tmp_path / "schemathesis.toml", "run",
            f"{url}/openapi.json", "--phases", "examples,coverage,fuzzing", "--max-examples", str(examples),
            "--seed", "7", "--generation-database", "none", "--continue-on-failure", "--no-color", "--warnings", "off",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | hooks, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (asked,) = re.findall(r"([\d,]+) generated, [\d,]+ passed", result.stdout)
    print(asked, "cases")
    assert int(asked.replace(",", "")) > 500 + 20 * examples
