"""The costs that the simulation needs and nothing else measures, and scaling where two cores show any.

    python -m benchmarks.scale.measure --prompts koala.jsonl --source alpaca_data.json --json FILE

* path: processor time of Serve's proxy, the ingress, the limiter and the generator, for a request and for an event of
  a stream, on `pacos serve` with the embedded base. Processor time, not time: others may use the machine.
* control: processor time a second of Serve's controller, Ray's GCS and raylet, with more and more idle replicas that
  report to the autoscaling policy as generators do; and how long a replica takes to start.
* data: `pacos prepare` with one CPU and with two, bound to as many cores; the source once (strong) and twice (weak).
* documents: adding documents of two pages one by one, their bytes on the disk, a copy that follows; and searching
  vectors that no file holds yet. Needs no Ray.
* training: LoRA on the embedded base with one worker and with two, of one thread each; as many records a step
  (strong) and twice as many (weak).

The simulation reads `benchmarks/results/scale-measured.json`. Each turn of a part is a process of its own; turns
alternate, and the file is written after each.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from app.atomic import write_text
from benchmarks.machine import describe

CLIENTS, REQUESTS, TOKENS = 16, 96, 64
REPLICAS = (2, 8)
IDLE_S = 20.0
STEPS, WARM_UP_STEPS, BATCH = 24, 8, 16
PARTS = ("path", "control", "documents", "data", "training")
DOCUMENTS, PAGE_CHARACTERS = 400, 3000
LIVE_VECTORS, WIDTH = (1_000, 10_000, 50_000, 100_000), 512
PROCESSES = {
    "proxy": "ray::ProxyActor",
    "ingress": "ray::ServeReplica:pacos:ingress",
    "limiter": "ray::ServeReplica:pacos:limiter",
    "generator": "ray::ServeReplica:pacos:generator",
    "controller": "ray::ServeController",
    "gcs": "gcs_server",
    "raylet": "raylet",
}
"""How their command lines begin, the last two their program's name."""


def main() -> None:
    arguments = parse()
    if arguments.turn:
        part, _, setting = arguments.turn.partition(":")
        print(json.dumps(TURNS[part](arguments, setting)))
        return
    report: dict[str, Any] = {"machine": describe("ray", "torch", "fastapi"), "parts": {}}
    if arguments.json and arguments.json.exists():
        report["parts"] = json.loads(arguments.json.read_text())["parts"]
    for part in arguments.parts:
        rows: dict[str, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS[part]}
        for turn in range(arguments.repeat):
            for setting in rows:
                rows[setting].append({**run_turn(part, setting), "load_average": round(os.getloadavg()[0], 1)})
                print(f"{turn + 1}/{arguments.repeat} {part} {setting}: {rows[setting][-1]}", flush=True)
                report["parts"][part] = {"median": SUMMARIES[part](rows), "runs": rows}
                if arguments.json:
                    write_text(arguments.json, json.dumps(report, indent=1) + "\n")
        print(f"{part}: {json.dumps(report['parts'][part]['median'], indent=1)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON Lines with `prompt` or `text`")
    parser.add_argument("--source", type=Path, required=True, help="instruction records, a JSON array")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeat", type=int, default=3, help="turns of each part; medians count")
    parser.add_argument("--json", type=Path, help="file to write the result to; parts that are not asked for stay")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_turn(part: str, setting: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale.measure", *sys.argv[1:], "--turn", f"{part}:{setting}"]
    environment = {**os.environ, "TMPDIR": tempfile.gettempdir()}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


# --- processor time ---


def cpu_s() -> dict[str, float]:
    """Seconds that each kind of process among this one's descendants has computed."""
    seconds: dict[str, float] = defaultdict(float)
    for process in psutil.Process().children(recursive=True):
        try:
            line, name, times = " ".join(process.cmdline()), process.name(), process.cpu_times()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        for kind, beginning in PROCESSES.items():
            if line.startswith(beginning) or name == beginning:
                seconds[kind] += times.user + times.system
    return seconds


@contextmanager
def computed() -> Iterator[dict[str, float]]:
    """Fills in what each kind of process computed in the block, and its `wall` time."""
    found: dict[str, float] = {}
    before, started = cpu_s(), time.perf_counter()
    yield found
    found |= {kind: seconds - before.get(kind, 0.0) for kind, seconds in cpu_s().items()}
    found["wall"] = time.perf_counter() - started


# --- the parts ---


def path(arguments: argparse.Namespace, _: str) -> dict[str, Any]:
    from app.config import KeyConfig
    from app.serving.access import new_key
    from benchmarks.serving import clients, servers
    from benchmarks.serving.__main__ import completion, read_prompts

    texts = read_prompts(arguments.prompts)
    options = argparse.Namespace(tokens=TOKENS)
    streamed = [completion(texts[number % len(texts)], options) for number in range(REQUESTS)]
    whole = [{**body, "stream": False, "stream_options": None} for body in streamed]
    cached = [{**whole[0], "temperature": 0.0, "max_tokens": 16}] * REQUESTS
    with tempfile.TemporaryDirectory() as folder:
        keys_file = Path(folder) / "keys.yaml"
        free = new_key(KeyConfig(name="free", keys_file=str(keys_file)))
        limits = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9}
        limited = new_key(KeyConfig(name="limited", keys_file=str(keys_file), **limits))
        settings = [f"access.keys_file={keys_file}"]
        started = time.perf_counter()
        with servers.pacos("embedded", threads=2, batch_size=64, log=Path(folder) / "log", settings=settings) as url:
            ready_s = time.perf_counter() - started

            with computed() as idle:
                time.sleep(IDLE_S)

            def ask(bodies: list[dict[str, Any]], key: str) -> tuple[dict[str, float], int]:
                """(processor seconds beyond those of an idle server, events that brought text)."""
                work = clients.closed_loop(f"{url}/v1/completions", bodies, num_clients=CLIENTS, key=key)
                with computed() as seconds:
                    answers = asyncio.run(work)
                wall = seconds.pop("wall")
                seconds = {kind: spent - idle.get(kind, 0.0) / idle["wall"] * wall for kind, spent in seconds.items()}
                wrong = [answer.error or answer.status for answer in answers if not answer.is_complete]
                if wrong:
                    raise SystemExit(f"{len(wrong)} requests were not answered, the first with {wrong[0]}")
                return seconds, sum(1 + len(answer.gaps) for answer in answers)

            ask(streamed[:CLIENTS], free)
            ask(cached[:1], free)
            stream_s, events = ask(streamed, free)
            whole_s, _ = ask(whole, free)
            hit_s, _ = ask(cached, free)
            limited_s, _ = ask(whole, limited)
    costs: dict[str, Any] = {"ready_s": ready_s, "events_a_request": events / REQUESTS}
    for kind in ("proxy", "ingress", "generator"):
        costs[f"{kind}_request_ms"] = 1000 * whole_s[kind] / REQUESTS
        costs[f"{kind}_event_ms"] = 1000 * (stream_s[kind] - whole_s[kind]) / events
        costs[f"{kind}_hit_ms"] = 1000 * hit_s[kind] / REQUESTS
    costs["limiter_request_ms"] = 1000 * limited_s["limiter"] / REQUESTS
    costs["ingress_limited_ms"] = 1000 * (limited_s["ingress"] - whole_s["ingress"]) / REQUESTS
    return {name: round(value, 3) for name, value in costs.items()}


class Reporter:
    """A replica that does nothing but report its load, as a generator does."""

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"queued_s": 0.0, "use": 0.75}

    def __call__(self) -> None: ...


def control(_: argparse.Namespace, setting: str) -> dict[str, Any]:
    import ray
    from ray import serve

    from app.ray_cluster import connected

    count = int(setting)
    autoscaling = {
        "min_replicas": count,
        "max_replicas": count,
        "look_back_period_s": 20,
        "policy": {"policy_function": "app.serving.autoscaling:TokenLoad"},
    }
    with connected(None):
        serve.start(proxy_location="Disabled")
        options = {"num_cpus": 0, "runtime_env": {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}}
        deployment = serve.deployment(autoscaling_config=autoscaling, ray_actor_options=options)(Reporter)
        started = time.perf_counter()
        serve.run(deployment.bind(), name="reporters", route_prefix=None)
        while serve.status().applications["reporters"].deployments["Reporter"].replica_states.get("RUNNING", 0) < count:
            time.sleep(0.2)
        start_s = time.perf_counter() - started
        time.sleep(15)  # until the first reports have come
        with computed() as seconds:
            time.sleep(IDLE_S)
        serve.shutdown()
        assert ray.is_initialized()
    found = {f"{kind}_cpu": seconds[kind] / seconds["wall"] for kind in ("controller", "gcs", "raylet")}
    return {name: round(value, 4) for name, value in {**found, "start_s": start_s}.items()}


def documents(arguments: argparse.Namespace, _: str) -> dict[str, Any]:
    import numpy as np

    from app.config.documents import ChunkingConfig
    from app.retrieval.chunking import Document
    from app.retrieval.embedding import Embedder
    from app.retrieval.index import LiveVectors
    from app.retrieval.library import Library
    from app.retrieval.replica import Follower

    rows = json.loads(arguments.source.read_text(encoding="utf-8"))
    text = "\n\n".join(row["output"] for row in rows)
    embedder = Embedder("embedded")
    embedder.embed(["warm"])
    with tempfile.TemporaryDirectory() as folder:
        library = Library(Path(folder), embedder=embedder, chunking=ChunkingConfig())
        started = time.process_time()
        for number in range(DOCUMENTS):
            part = text[number * PAGE_CHARACTERS :][:PAGE_CHARACTERS]
            document = Document(f"{number}.txt", part)
            library.add([library.prepared(document, kind="text", num_bytes=len(part.encode()))])
        write_s = time.process_time() - started
        passages = sum(record.num_chunks for record in library.records(limit=DOCUMENTS)[0])
        num_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        follower = Follower(_Here(library), embedder)
        started = time.process_time()
        while follower.catch_up():
            pass
        follow_s = time.process_time() - started
    found = {
        "write_cpu_ms": 1000 * write_s / DOCUMENTS,
        "follow_cpu_ms": 1000 * follow_s / DOCUMENTS,
        "passages_a_document": passages / DOCUMENTS,
        "bytes_a_passage": num_bytes / passages,
    }
    random = np.random.default_rng(0)
    for count in LIVE_VECTORS:
        vectors = random.standard_normal((count, WIDTH), dtype=np.float32)
        live = LiveVectors.empty(WIDTH).changed(gone=(), ids=range(count), vectors=vectors)
        times = []
        for query in random.standard_normal((15, WIDTH), dtype=np.float32):
            started = time.thread_time()
            live.search(query, top_k=200)
            times.append(time.thread_time() - started)
        found[f"live_{count}_ms"] = 1000 * statistics.median(times)
    return {name: round(value, 3) for name, value in found.items()}


class _Here:
    """A library in this process, as a copy asks it."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def changes(self, since: int, vectors_since: int) -> Any:
        return self._library.changes(since, vectors_since=vectors_since, max_bytes=2**22)

    def snapshot_piece(self, version: int, offset: int) -> bytes | None:
        return None


def data(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    cpus, copies = (int(number) for number in setting.split("x"))
    os.sched_setaffinity(0, set(range(cpus)))
    import ray

    from app.config import PrepareConfig
    from app.data.prepare import prepare

    rows = json.loads(arguments.source.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.json"
        source.write_text(json.dumps(rows * 10 * copies))
        values = {"source": str(source), "output": f"{folder}/data", "layout": {"type": "packed"}, "duplicates": "keep"}
        config = PrepareConfig.model_validate({**values, "model": "embedded"})
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        ray.get([ray.remote(lambda: time.sleep(0.5)).remote() for _ in range(cpus)])  # a process for each
        started = time.perf_counter()
        manifest = prepare(config)
        seconds = time.perf_counter() - started
        ray.shutdown()
    records = sum(split["records"] for split in manifest.values["splits"].values())
    return {"records": records, "seconds": round(seconds, 2), "records_per_s": round(records / seconds)}


def training(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    workers, batch = (int(number) for number in setting.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        rows = json.loads(arguments.source.read_text(encoding="utf-8"))[:4000]
        source = Path(folder) / "source.json"
        source.write_text(json.dumps(rows))
        pacos = [sys.executable, "-m", "app.cli"]
        prepared = ["prepare", f"source={source}", f"output={folder}/data", "layout.type=packed", "max_length=256"]
        run = [
            "train", f"data={folder}/data", f"output={folder}/run", "model=embedded", "method.type=lora",
            f"batch_size={batch}", f"max_steps={STEPS}", f"eval_every={STEPS}", f"save_every={STEPS}",
            f"workers.count={workers}", "workers.threads=1", "workers.cpus=1",
        ]  # fmt: skip
        for command in (prepared, run):
            subprocess.run([*pacos, *command], check=True, stdout=sys.stderr)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "step_s" in row][WARM_UP_STEPS:]
    return {
        "step_s": round(statistics.median(row["step_s"] for row in steps), 3),
        "tokens_per_s": round(sum(row["tokens"] for row in steps) / sum(row["step_s"] for row in steps)),
    }


# --- medians ---

Rows = dict[str, list[dict[str, Any]]]


def medians(rows: Rows) -> dict[str, dict[str, float]]:
    return {
        setting: {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
        for setting, runs in rows.items()
        if runs
    }


def slopes(rows: Rows) -> dict[str, Any]:
    """Of processor use over the number of replicas, by least squares over all runs."""
    points = [(int(setting), run) for setting, runs in rows.items() for run in runs]
    found: dict[str, Any] = dict(medians(rows))
    if len({count for count, _ in points}) > 1:
        for kind in ("controller", "gcs", "raylet"):
            line = statistics.linear_regression([c for c, _ in points], [run[f"{kind}_cpu"] for _, run in points])
            found[f"{kind}_cpu_a_replica"], found[f"{kind}_cpu_alone"] = (round(part, 5) for part in line)
    return found


SETTINGS = {
    "path": ("",),
    "control": tuple(str(count) for count in REPLICAS),
    "documents": ("",),
    "data": ("1x1", "2x1", "2x2"),
    "training": (f"1x{BATCH}", f"2x{BATCH}", f"2x{2 * BATCH}"),
}
"""data: CPUs x copies of the source; training: workers x records a step."""
TURNS = {"path": path, "control": control, "documents": documents, "data": data, "training": training}
SUMMARIES = {"path": medians, "control": slopes, "documents": medians, "data": medians, "training": medians}

if __name__ == "__main__":
    main()
