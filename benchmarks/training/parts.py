"""What a process of the comparison does, by its name."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.machine import has_bf16
from benchmarks.training import pacos, peers
from benchmarks.training.task import Task, make_inputs, read_task

Part = Callable[[argparse.Namespace], dict[str, Any]]


def _inputs(arguments: argparse.Namespace) -> dict[str, Any]:
    options = arguments
    task = Task(str(options.folder), options.steps, options.passes, options.threads, options.packed_length)
    return make_inputs(task, source=options.source, tokenizer=options.tokenizer)


def _peak(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.training.flops import machine_peak

    return {"has_bf16_instructions": has_bf16(), **machine_peak(arguments.threads)}


def _peer(arguments: argparse.Namespace, *, name: str) -> dict[str, Any]:
    peer = peers.PEERS[name]
    if peer.bf16_weights and not has_bf16():
        return {"skipped": "this processor has no instructions for bf16, and would emulate it; fp32 weights are tuned"}
    return peers.train(_task(arguments), peer)


def _pacos(arguments: argparse.Namespace, *, layout: str) -> dict[str, Any]:
    return pacos.in_process(_task(arguments), layout)


def _ray(arguments: argparse.Namespace) -> dict[str, Any]:
    return pacos.through_ray(_task(arguments))


def _task(arguments: argparse.Namespace) -> Task:
    """That of the folder, with as many threads as this contender has."""
    return replace(read_task(arguments.folder), threads=arguments.threads)


PARTS: dict[str, Part] = {
    "inputs": _inputs,
    "peak": _peak,
    **{name: partial(_peer, name=name) for name in peers.PEERS},
    "pacos_process_padded": partial(_pacos, layout="padded"),
    "pacos_process": partial(_pacos, layout="packed"),
    "pacos_ray": _ray,
    "pacos_process_spare": partial(_pacos, layout="packed"),
    "pacos_ray_spare": _ray,
}
