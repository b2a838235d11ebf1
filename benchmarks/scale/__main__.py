"""The serving cluster simulated, from one replica to a thousand, with measured service times.

    python -m benchmarks.scale --json benchmarks/results/scale.json --plots docs/images

What its parts cost is read from the recorded results of the other benchmarks, and of `benchmarks.scale.measure`. A run
takes some minutes of one core, is decided by its seed, and writes the file after each scenario.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.atomic import write_text
from benchmarks.machine import describe
from benchmarks.scale import plots
from benchmarks.scale.profiles import cpu, h200, h200_large, path_costs
from benchmarks.scale.scenarios import LOAD, PATH_USE, SCENARIOS, SEED


def main() -> None:
    arguments = parse()
    report: dict[str, Any] = {"machine": describe("ray", "numpy"), "seed": SEED, "parameters": parameters()}
    report["scenarios"] = {}
    if arguments.json and arguments.json.exists():
        report["scenarios"] = json.loads(arguments.json.read_text())["scenarios"]
    for name in arguments.only:
        started = time.process_time()
        report["scenarios"][name] = rounded(SCENARIOS[name]())
        print(f"{name}, {time.process_time() - started:.0f} s: {shown(report['scenarios'][name])}", flush=True)
        if arguments.json:
            write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    if arguments.plots:
        plots.draw(report["scenarios"], arguments.plots)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, default=list(SCENARIOS), metavar="SCENARIO")
    parser.add_argument("--json", type=Path, help="file to write the result to; other scenarios in it stay")
    parser.add_argument("--plots", type=Path, help="folder to draw into")
    return parser.parse_args()


def parameters() -> dict[str, Any]:
    """All that the simulation assumes, and where each figure is from."""
    proxy, ingress = path_costs()
    return {
        "replicas": [asdict(profile) for profile in (cpu(), h200(), h200_large())],
        "proxy": asdict(proxy) | {"source": "scale-measured.json, path"},
        "ingress": asdict(ingress) | {"source": "scale-measured.json, path"},
        "load": LOAD,
        "path_use": PATH_USE,
    }


def rounded(value: Any) -> Any:
    """To five digits; NaN is no JSON."""
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.5g}")
    return value


def shown(value: Any) -> str:
    def without_series(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: without_series(each) for key, each in part.items() if key != "series"}
        return [without_series(each) for each in part] if isinstance(part, list) else part

    return json.dumps(without_series(value), indent=1)


if __name__ == "__main__":
    main()
