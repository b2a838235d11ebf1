"""Chat, retrieval, document changes, promotions and a training job, all at once and for hours, on a head and three
workers: whether memory stays, answers stay as quick, and nothing fails.

    python -m benchmarks.soak --minutes 120 --json benchmarks/results/soak.json --plot docs/images/soak.png

The hosts are those of `make chaos` (docs/chaos.md), the endpoint is theirs too, with the embedded base. `load.py` says
what is asked, `memory.py` what is measured of every process on every host, `verdict.py` what must hold after the first
quarter, in which caches fill. Exits with 1 where it does not. Every ten minutes the files are written with what has
been seen by then, so that a soak that is cut short is a shorter one.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app.assets import model_folder
from app.atomic import write_text
from benchmarks.machine import describe
from benchmarks.soak.load import documents_in, load, train
from benchmarks.soak.memory import Memory
from benchmarks.soak.plot import draw
from benchmarks.soak.verdict import Asked, verdict
from tests.chaos.cluster import Cluster, cluster
from tests.chaos.endpoint import Endpoint
from tests.chaos.hosts import REPOSITORY
from tests.chaos.namespaces import go_on_in_namespaces
from tests.chaos.runs import steps_of
from tests.chaos.traffic import Traffic
from tests.chaos.versions import Versions

NUM_SAMPLES = 120
WRITE_EVERY_S = 600.0
PROMOTE_EVERY_S = 20.0
GENERATOR = {"max_kv_bytes": 16 * 2**20}
"""Full within the warm-up, so that what still grows then is no cache."""
CACHE = {"ttl_s": 60}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--plot", type=Path, help="file to draw it to")
    parser.add_argument("--folder", type=Path, help="keep the hosts' disks there, and all logs; else they go")
    parser.add_argument("--in-namespaces", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.in_namespaces:
        go_on_in_namespaces([sys.executable, "-m", "benchmarks.soak", *sys.argv[1:], "--in-namespaces"])
    os.chdir(REPOSITORY)

    def write(report: dict[str, Any]) -> None:
        if arguments.json:
            write_text(arguments.json, json.dumps(described | report) + "\n")
        if arguments.plot:
            draw(report, arguments.plot)

    described = {"machine": describe("ray", "torch")}
    with tempfile.TemporaryDirectory() as temporary, cluster(arguments.folder or Path(temporary)) as started:
        report = soak(started, arguments.minutes, write)
    write(report)
    shown = {key: value for key, value in report.items() if key not in ("memory", "answers")}
    print(json.dumps(described | shown, indent=2))
    sys.exit(0 if all(bar["reached"] for bar in report["bars"]) else 1)


def soak(cluster: Cluster, minutes: float, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    model = Path(model_folder("embedded"))
    versions = Versions(cluster.shared, model)
    run = train(cluster)
    memory = Memory([cluster.head, cluster.redis, *cluster.workers])
    documents = cluster.shared / "documents"
    documents.mkdir()
    with Endpoint(
        cluster, model, deltas={"live": versions.served}, documents=documents, tracking=versions.uri,
        generator=GENERATOR, cache=CACHE,
    ) as endpoint:  # fmt: skip
        ids = documents_in(endpoint)
        began, num_promotions, num_written, steps_before = time.monotonic(), 0, 0, len(steps_of(run))
        with load(endpoint, ids) as traffics:

            def seen(minutes: float) -> dict[str, Any]:
                return verdict(minutes, memory=memory.series(), requests=_asked(traffics, began)) | {
                    "promotions": num_promotions, "training_steps": len(steps_of(run)) - steps_before,
                }  # fmt: skip

            while (elapsed_s := time.monotonic() - began) < 60 * minutes:
                if elapsed_s >= memory.num_samples * 60 * minutes / NUM_SAMPLES:
                    memory.sample(elapsed_s)
                if elapsed_s >= num_promotions * PROMOTE_EVERY_S:
                    versions.promote(2 - num_promotions % 2)
                    num_promotions += 1
                if elapsed_s >= (num_written + 1) * WRITE_EVERY_S:
                    write(seen(elapsed_s / 60))
                    num_written += 1
                time.sleep(0.1)
        return seen(minutes)


def _asked(traffics: Mapping[str, Traffic], began: float) -> dict[str, list[Asked]]:
    return {
        kind: [(round(asked.began - began, 2), round(asked.seconds, 4), asked.met) for asked in list(traffic.asked)]
        for kind, traffic in traffics.items()
    }


if __name__ == "__main__":
    main()
