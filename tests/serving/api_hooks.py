"""For `st run`, by SCHEMATHESIS_HOOKS: requests for a model that is there, with short answers.

A generated name is a model that does not exist, so hardly a request would come further than that.
"""

from typing import Any

import schemathesis

MOST_TOKENS = 4
_LENGTHS = ("max_tokens", "max_completion_tokens")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """What is wrong with a body stays as it is."""
    if not isinstance(body, dict):
        return body
    lengths = {name: MOST_TOKENS for name in _LENGTHS if _is_count(body.get(name))}
    if context.operation.path == "/v1/chat/completions" and not any(body.get(name) for name in _LENGTHS):
        lengths["max_tokens"] = MOST_TOKENS  # else the context is the limit
    names = {"model": _model(context)} if isinstance(body.get("model"), str) else {}
    return body | lengths | names


def _model(context: Any) -> str:
    return "pacos-embedder" if context.operation.path == "/v1/embeddings" else "pacos"


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > MOST_TOKENS and value % 1 == 0
