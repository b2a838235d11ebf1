"""How fast vectors are found, and how many of the right ones: exactly, along a graph (HNSW), in lists (IVF-PQ).

    python -m benchmarks.retrieval --json benchmarks/results/retrieval.json --plot docs/images/retrieval.png

1,000,000 unit vectors of the embedded embedder's 512 dimensions around 10,000 centres, 1,000 questions from the same
distribution. Each structure is built and searched with the settings that the application itself gives it
(`app/retrieval/index.py`), one question at a time on one thread, as a server's replica does, for 10 hits and for the
200 that the hybrid search looks at; beside it all questions at once on all cores. Vectors that lie in clusters are what
embeddings are; uniform ones have no neighbours worth the name, and would flatter nobody but the exact search.

`--kinds` runs some of the structures and leaves the others' figures in the file as they are.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from app.atomic import write_text
from app.retrieval.index import empty_index, search_parameters
from benchmarks.folder import kept_or_temporary
from benchmarks.machine import describe

KINDS = ("flat", "hnsw", "ivf_pq")
DEPTHS = (10, 200)
CENTRES = 10_000
SPREAD = 0.7
"""Length of what a vector has of its own, where its centre's is 1."""
EFFORTS = {"flat": (0,), "hnsw": (0, 64, 128, 256, 512, 1024), "ivf_pq": (0, 16, 64, 128, 256)}
"""How thoroughly each is searched: HNSW's efSearch, IVF's nprobe; 0 is what the application takes."""
TIMED = {"flat": 50, "hnsw": 1000, "ivf_pq": 1000}
"""Questions that are timed one at a time; the exact search takes as long for each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where vectors and exact answers are kept for the next time")
    arguments = parser.parse_args()
    report = _earlier(arguments)
    with kept_or_temporary(arguments.folder) as folder:
        vectors, questions = _data(folder, arguments)
        exact = _exact(folder, vectors, questions, arguments.threads)
        for kind in arguments.kinds:
            figures = measure(kind, folder, vectors, questions, exact, threads=arguments.threads)
            report["runs"] = [run for run in report["runs"] if run["kind"] != kind] + [figures]
            report["runs"].sort(key=lambda run: KINDS.index(run["kind"]))
            print(json.dumps(figures), flush=True)
            if arguments.json:
                write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot(report, arguments.plot)


def measure(
    kind: str, folder: Path, vectors: np.ndarray, questions: np.ndarray, exact: np.ndarray, *, threads: int
) -> dict[str, Any]:
    """`exact` [questions, deepest] are the right ids."""
    file = folder / f"{kind}-{len(vectors)}-{vectors.shape[1]}.faiss"
    if not file.is_file():
        figures = build(kind, file, vectors, threads=threads)
        file.with_suffix(".json").write_text(json.dumps(figures))
    figures = json.loads(file.with_suffix(".json").read_text()) | {"kind": kind, "bytes": file.stat().st_size}
    owner = faiss.read_index(str(file))
    index = faiss.downcast_index(owner)
    figures["searches"] = [
        search(index, questions, exact[:, :depth], effort=effort, timed=TIMED[kind], threads=threads)
        for depth in DEPTHS
        for effort in EFFORTS[kind]
    ]
    return figures


def build(kind: str, file: Path, vectors: np.ndarray, *, threads: int) -> dict[str, Any]:
    faiss.omp_set_num_threads(threads)
    started = time.perf_counter()
    index = empty_index(faiss, kind, len(vectors), vectors.shape[1])  # type: ignore[arg-type]
    if not index.is_trained:
        index.train(vectors)
    trained_s = time.perf_counter() - started
    index.add(vectors)
    build_s = time.perf_counter() - started
    faiss.write_index(index, str(file))
    return {"build_s": round(build_s, 1), "of_it_training_s": round(trained_s, 1)}


def search(
    index: Any, questions: np.ndarray, exact: np.ndarray, *, effort: int, timed: int, threads: int
) -> dict[str, Any]:
    depth = exact.shape[1]
    parameters = search_parameters(faiss, index, top_k=depth, effort=effort)
    faiss.omp_set_num_threads(1)
    index.search(questions[:10], depth, params=parameters)  # warm
    latencies = []
    for number in range(min(timed, len(questions))):
        started = time.perf_counter()
        index.search(questions[number : number + 1], depth, params=parameters)
        latencies.append(time.perf_counter() - started)
    faiss.omp_set_num_threads(threads)
    started = time.perf_counter()
    _, found = index.search(questions, depth, params=parameters)
    seconds = time.perf_counter() - started
    return {
        "top_k": depth,
        "effort": effort,
        "recall": round(recall(found, exact), 4),
        "questions_per_s": round(len(latencies) / sum(latencies), 1),
        "median_ms": round(1000 * float(np.median(latencies)), 3),
        "p99_ms": round(1000 * float(np.quantile(latencies, 0.99)), 3),
        "all_at_once_per_s": round(len(questions) / seconds, 1),
    }


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of `exact` [questions, depth] that `found` has."""
    return float(np.mean([np.isin(right, ids).mean() for ids, right in zip(found, exact, strict=True)]))


def clustered(count: int, centres: np.ndarray, *, seed: int) -> np.ndarray:
    """float32 unit vectors [count, width], each around one of `centres` [any, width]."""
    random = np.random.default_rng(seed)
    width = centres.shape[1]
    vectors = np.empty((count, width), dtype=np.float32)
    for start in range(0, count, 100_000):
        part = vectors[start : start + 100_000]
        random.standard_normal(part.shape, dtype=np.float32, out=part)
        part *= SPREAD / np.sqrt(width)
        part += centres[random.integers(len(centres), size=len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def _data(folder: Path, arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    file = folder / f"vectors-{arguments.vectors}-{arguments.width}.npy"
    centres = clustered(CENTRES, np.zeros((1, arguments.width), dtype=np.float32), seed=0)
    if not file.is_file():
        np.save(file, clustered(arguments.vectors, centres, seed=1))
    return np.load(file), clustered(arguments.questions, centres, seed=2)


def _exact(folder: Path, vectors: np.ndarray, questions: np.ndarray, threads: int) -> np.ndarray:
    file = folder / f"exact-{len(vectors)}-{vectors.shape[1]}-{len(questions)}.npy"
    if not file.is_file():
        faiss.omp_set_num_threads(threads)
        _, ids = faiss.knn(questions, vectors, max(DEPTHS), metric=faiss.METRIC_INNER_PRODUCT)
        np.save(file, ids)
    return np.load(file)


def _earlier(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {name: getattr(arguments, name) for name in ("vectors", "width", "questions", "threads")}
    machine = describe("faiss-cpu", "numpy")
    if arguments.json and arguments.json.is_file():
        report = json.loads(arguments.json.read_text(encoding="utf-8"))
        if report["settings"] == settings and report["machine"] == machine:
            return report
    return {"machine": machine, "settings": settings, "runs": []}


def plot(report: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(DEPTHS), figsize=(10, 3.6))
    colors = {"flat": "#444444", "hnsw": "#2a6f97", "ivf_pq": "#d1495b"}
    for axis, depth in zip(axes, DEPTHS, strict=True):
        for run in report["runs"]:
            searches = [search for search in run["searches"] if search["top_k"] == depth]
            label = f"{run['kind']}, {run['bytes'] / 2**30:.1f} GiB, built in {run['build_s']:.0f} s"
            chosen, *others = searches
            curve = sorted(others or searches, key=lambda search: search["effort"])
            points = [(search["recall"], search["questions_per_s"]) for search in curve]
            axis.plot(*zip(*points, strict=True), "o-", color=colors[run["kind"]], label=label, markersize=4)
            axis.plot(chosen["recall"], chosen["questions_per_s"], "*", color=colors[run["kind"]], markersize=12)
        axis.set(xlabel=f"recall@{depth}", ylabel="questions/s, one thread", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7)
    settings, machine = report["settings"], report["machine"]
    figure.suptitle(
        f"{settings['vectors']:,} vectors of {settings['width']}; the star is the application's setting · "
        f"{machine['processor']}, {machine['cores']} cores",
        fontsize=9,
    )
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
