"""Parts as processes of their own, with the memory of all their descendants watched."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

INTERVAL_S = 1.0


def run_part(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What part `name` prints as its last line; of one that dies, why, for the others go on."""
    command = [sys.executable, "-m", "benchmarks.training", "--part", name, "--folder", str(folder)]
    for option in ("source", "tokenizer", "steps", "passes", "threads", "packed_length"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    watch = TreeWatch(process.pid)
    try:
        output, errors = process.communicate()
    finally:
        process.terminate()  # where this process is told to end; else it has ended already
    seconds, tree_peak = round(time.perf_counter() - started, 1), watch.stop()
    if process.returncode:
        # -9 without a word is how the kernel ends a process when memory is out
        return {"failed": f"exit status {process.returncode}: {errors.strip()[-500:]}", "tree_peak_bytes": tree_peak}
    return {**json.loads(output.splitlines()[-1]), "whole_process_s": seconds, "tree_peak_bytes": tree_peak}


def run_needed(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A part that all others build on."""
    result = run_part(name, arguments, folder)
    if "failed" in result:
        raise SystemExit(f"{name}: {result['failed']}")
    return result


class TreeWatch:
    """The largest sum of resident memory of a process and all below it, looked up every second.

    More often would slow down whom it watches: a thread that is pushed aside holds up the other at the next barrier.
    """

    def __init__(self, process_id: int) -> None:
        self._process_id = process_id
        self._peak = 0
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._finished.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._finished.wait(INTERVAL_S):
            self._peak = max(self._peak, self._resident())

    def _resident(self) -> int:
        import psutil

        try:
            root = psutil.Process(self._process_id)
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        total = 0
        for process in tree:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:  # it has ended meanwhile
                continue
        return total
