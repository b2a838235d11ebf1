"""`ray start` commands as Ray itself reads them."""

import shlex
from typing import Any

import click
from ray.scripts.scripts import start

_ENDS = {";", "&&", "||", "|"}
_OF_THE_HEAD = ("port", "include_dashboard", "redis_shard_ports")
"""What `ray start` refuses when it has started already, for a node that is no head."""


def ray_starts(command: str) -> list[dict[str, Any]]:
    """The options of every `ray start` in a shell command, with defaults; a click error for one that does not exist."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words = list(lexer)
    return [options(_up_to_end(words[i + 2 :])) for i in range(len(words)) if words[i : i + 2] == ["ray", "start"]]


def options(arguments: list[str]) -> dict[str, Any]:
    parsed = start.make_context("ray start", list(arguments)).params
    if parsed["address"] and not parsed["head"] and any(parsed[option] is not None for option in _OF_THE_HEAD):
        raise click.UsageError(f"of a head alone: {arguments}")
    return parsed


def _up_to_end(words: list[str]) -> list[str]:
    return words[: next((i for i, word in enumerate(words) if word in _ENDS), len(words))]
