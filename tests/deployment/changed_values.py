"""Files with one mistake in them."""

import copy
from typing import Any


def with_value(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at `path`, keys and positions joined by dots."""
    values = copy.deepcopy(values)
    *parents, last = path.split(".")
    inner: Any = values
    for key in parents:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[last] = value
    return values
