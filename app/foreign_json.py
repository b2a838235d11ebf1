"""JSON files that someone else may have made, with a model, a delta or a checkpoint: data, and not without end."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 2**26
"""The longest that there are list a model's tensors, and take a tenth of it."""


def read_json(file: Path) -> Any:
    """
    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is no plain file, not UTF-8, no JSON, longer than `MAX_BYTES`, or nested too deeply.
    """
    if file.exists() and not file.is_file():  # to open a pipe would wait, to read a device would not end
        raise ValueError(f"{file.name} is no plain file")
    with file.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{file.name} is longer than {MAX_BYTES} bytes")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{file.name} is nested too deeply") from None
