"""How fast records become shards, beside the bare tokenizer and Hugging Face `datasets`, and in how much memory.

    python -m benchmarks.data --source alpaca_data.json --tokenizer gpt2 --json benchmarks/results/data.json

All encode the same texts, prompts and responses apart, on as many processes as there are cores; every repetition is a
new set of processes, so that nothing is remembered from the one before. Start-up (imports, processes, the tokenizer in
each, Ray) is set aside and reported apart. What counts of Pacos is everything after it: reading and hashing the file,
validating, looking for copies, tokenizing, packing, writing Parquet and the manifest. `datasets.map` starts its
processes in each call: it stands with and without that.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

CORES = os.cpu_count() or 1
REPEATED = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="instruction records, a JSON array")
    parser.add_argument("--tokenizer", default="embedded", help="model folder whose tokenizer is used")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--json", required=True, help="file to write the result to")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.source, arguments.tokenizer)))
        return
    runs: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS if part != "memory"}
    for number in range(arguments.repeat):
        for part in runs:  # in turn, so that a slow moment of the machine hits all alike
            runs[part].append(run_part(part, arguments))
            print(f"{number + 1}/{arguments.repeat} {part}: {runs[part][-1]}", flush=True)
    memory = run_part("memory", arguments)
    print(f"memory: {memory}", flush=True)
    report(arguments, runs, memory)


def run_part(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.data", "--part", part, "--json", "-"]
    command += ["--source", arguments.source, "--tokenizer", arguments.tokenizer]
    started = time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {**json.loads(output.splitlines()[-1]), "whole_process_s": round(time.perf_counter() - started, 3)}


def report(arguments: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], memory: dict[str, Any]) -> None:
    rates = {
        part: statistics.median(run["records"] / run["seconds"] for run in of_part) for part, of_part in runs.items()
    }
    result = {
        "machine": describe("ray", "tokenizers", "datasets", "pyarrow"),
        "records": runs["pacos"][0]["records"],
        "tokens": runs["pacos"][0]["tokens"],
        "tokenizer_entries": runs["pacos"][0]["vocab_size"],
        "records_per_s": {part: round(rate) for part, rate in rates.items()},
        "pacos_over": {part: round(rates["pacos"] / rate, 2) for part, rate in rates.items() if part != "pacos"},
        "pacos_over_whole_call": {
            part: round(
                rates["pacos"] / statistics.median(r["records"] / (r["seconds"] + r["startup_s"]) for r in runs[part]),
                2,
            )
            for part in runs
            if part.startswith("datasets")
        },
        "memory": memory,
        "runs": runs,
    }
    Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))


# --- the parts, each in a process of its own ---


def texts_of(source: str) -> list[tuple[str, str]]:
    """Prompt and response of each valid record."""
    from app.data.chunks import read_rows
    from app.data.prompts import PacosTemplate
    from app.data.records import Invalid, RowReader

    reader, template, texts = RowReader("alpaca"), PacosTemplate(), []
    for row in read_rows(Path(source)):
        try:
            prompt, response = template.segments(reader.read(row)[0])
        except Invalid:
            continue
        texts.append((prompt.text, response.text))
    return texts


def bare(source: str, tokenizer: str) -> dict[str, Any]:
    """`tokenizers.encode_batch`, one process a core with one thread each; the ids are not even looked at."""
    texts = texts_of(source)
    context = multiprocessing.get_context("spawn")
    barrier, spans = context.Barrier(CORES), context.Queue()
    processes = [
        context.Process(target=_encode_bare, args=(texts[core::CORES], tokenizer, barrier, spans))
        for core in range(CORES)
    ]
    for process in processes:
        process.start()
    measured = [spans.get() for _ in processes]
    for process in processes:
        process.join()
    seconds = max(end for _, end in measured) - min(start for start, _ in measured)
    return {"records": len(texts), "seconds": round(seconds, 3)}


def _encode_bare(pairs: list[tuple[str, str]], tokenizer: str, barrier: Any, spans: Any) -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"
    from app.assets import model_folder
    from app.data.tokenization import load_tokenizer

    backend = load_tokenizer(model_folder(tokenizer)).backend
    texts = [text for pair in pairs for text in pair]
    barrier.wait()
    start = time.time()
    backend.encode_batch(texts, add_special_tokens=False)
    spans.put((start, time.time()))


def datasets(
    source: str, tokenizer: str, *, batched: bool = False, bare: bool = False, from_file: bool = False
) -> dict[str, Any]:
    """`datasets.map(num_proc=cores)` with ids and labels of each record, from its first call to its end.

    With the tokenizer of `transformers`, as its documentation has it; or with the bare one of `tokenizers`. Prompts
    and responses are valid and rendered beforehand; or, `from_file`, `load_dataset` of the file counts too, and the
    map renders them.
    """
    os.environ["RAYON_NUM_THREADS"] = "1"
    import datasets as hf
    from transformers import PreTrainedTokenizerFast

    from app.assets import model_folder
    from app.data.prompts import PacosTemplate
    from app.data.records import Instruction
    from app.data.tokenization import load_tokenizer

    template = PacosTemplate()
    hf.disable_caching()
    hf.disable_progress_bars()
    load_s = 0.0
    texts = texts_of(source)
    records = hf.Dataset.from_dict({"prompt": [p for p, _ in texts], "response": [r for _, r in texts]})
    loaded = load_tokenizer(model_folder(tokenizer))
    backend, end = loaded.backend, loaded.end_id
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend)

    def ids_of(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids if bare else theirs(text)["input_ids"]

    def ids_of_batch(texts: list[str]) -> list[list[int]]:
        if bare:
            return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
        return theirs(texts)["input_ids"]

    def joined(prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        return [*prompt, *response, end], [-100] * len(prompt) + [*response, end]

    def encode(record: dict[str, Any]) -> dict[str, Any]:
        started = time.time()
        ids, labels = joined(ids_of(record["prompt"]), ids_of(record["response"]))
        return {"input_ids": ids, "labels": labels, "started": started}

    def encode_batch(records: dict[str, Any]) -> dict[str, Any]:
        started = time.time()
        pairs = zip(ids_of_batch(records["prompt"]), ids_of_batch(records["response"]), strict=True)
        rows = [joined(prompt, response) for prompt, response in pairs]
        return {
            "input_ids": [ids for ids, _ in rows],
            "labels": [labels for _, labels in rows],
            "started": [started] * len(rows),
        }

    def encode_row(row: dict[str, Any]) -> dict[str, Any]:
        prompt, response = template.segments(Instruction(row["instruction"], row["input"], row["output"]))
        return encode({"prompt": prompt.text, "response": response.text})

    cache = tempfile.TemporaryDirectory()
    if from_file:
        started = time.time()
        records = hf.load_dataset("json", data_files=source, split="train", cache_dir=cache.name)
        load_s = time.time() - started
    called = time.time()
    result = records.map(
        encode_row if from_file else encode_batch if batched else encode,
        batched=batched,
        num_proc=CORES,
        remove_columns=records.column_names,
    )
    ended = time.time()
    first = min(result["started"])
    seconds = load_s + ended - first
    return {"records": len(texts), "seconds": round(seconds, 3), "startup_s": round(first - called, 3)}


def pacos(source: str, tokenizer: str) -> dict[str, Any]:
    """The whole of `pacos prepare`, into rows of 1,024."""
    return _prepare(source, tokenizer, duplicates="drop")


def _prepare(
    source: str, tokenizer: str, *, duplicates: str, watch: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    started = time.perf_counter()
    import ray.data

    from app.config import PrepareConfig
    from app.data.prepare import prepare
    from app.ray_cluster import connected, on_all_cpus

    folder = Path(tempfile.mkdtemp())
    config = PrepareConfig.model_validate(
        {
            "source": str(Path(source).absolute()),
            "output": str(folder / "data"),
            "model": tokenizer,
            "layout": {"type": "packed"},
            "duplicates": duplicates,
        }
    )
    try:
        with connected(None):
            # A worker process for each core, with code and tokenizer loaded as the peers have them; Ray Data's actors.
            cores = on_all_cpus(ray.data.range(CORES, override_num_blocks=CORES))
            cores.map(_load, fn_kwargs={"model": config.model}).materialize()
            ready = time.perf_counter()
            before = watch()
            manifest = prepare(config)
            done = time.perf_counter()
            after = watch()
        ended = time.perf_counter()
    finally:
        shutil.rmtree(folder)
    splits = manifest.values["splits"]
    train = splits["train"]
    return {
        "records": sum(split["records"] for split in splits.values()),
        "seconds": round(done - ready, 3),
        "startup_s": round(ready - started, 3),
        "shutdown_s": round(ended - done, 3),
        "tokens": sum(split["tokens"] for split in splits.values()),
        "vocab_size": manifest.values["vocab_size"],
        "row_fill": round(train["tokens"] / train["rows"] / 1024, 4),
        **({"watched": [before, after]} if before is not None else {}),
    }


def _load(row: dict[str, Any], *, model: str) -> dict[str, Any]:
    from app.assets import model_folder
    from app.data.passes import load_expected
    from app.data.tokenization import load_tokenizer

    fingerprint = load_tokenizer(model_folder(model)).fingerprint()
    load_expected(model, fingerprint).encode_batch(["hello"], is_canonical=True)
    time.sleep(1)  # long enough that each goes to a process of its own
    return row


def memory(source: str, tokenizer: str) -> dict[str, Any]:
    """The source twenty times over, copies kept: the peak of all processes together, Ray's among them."""
    import psutil

    rows = json.loads(Path(source).read_text(encoding="utf-8")) * REPEATED
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "repeated.json"
        file.write_text(json.dumps(rows), encoding="utf-8")
        count, size = len(rows), file.stat().st_size
        del rows
        peak, stop = [0], threading.Event()

        def usage() -> int:
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss  # shared pages counted once
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            return total

        def sample() -> None:
            while not stop.wait(0.25):
                peak[0] = max(peak[0], usage())

        def watch() -> float:
            return round(usage() / 2**30, 2)

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        result = _prepare(str(file), tokenizer, duplicates="keep", watch=watch)
        stop.set()
        sampler.join()
    before, after = result.pop("watched")
    return {
        "source_records": count,
        "source_mib": round(size / 2**20),
        **result,
        "records_per_s": round(result["records"] / result["seconds"]),
        "peak_gib": round(peak[0] / 2**30, 2),
        "before_gib": before,
        "after_gib": after,
    }


PARTS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "bare": bare,
    "datasets_load_and_map": partial(datasets, from_file=True),
    "datasets_map": datasets,
    "datasets_map_batched": partial(datasets, batched=True),
    "datasets_map_bare": partial(datasets, bare=True),
    "datasets_map_bare_batched": partial(datasets, bare=True, batched=True),
    "pacos": pacos,
    "memory": memory,
}

if __name__ == "__main__":
    main()
