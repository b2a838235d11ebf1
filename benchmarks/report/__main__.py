"""benchmarks/REPORT.md, all committed figures in one place: `python -m benchmarks.report`.

Nothing is measured here, and nothing is written by hand there: a test holds the committed report equal to what this
makes of benchmarks/results/*.json.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.report.sections import SECTIONS, Section, any_result
from benchmarks.report.tables import number, table

FOLDER = Path(__file__).parent.parent
RESULTS, REPORT = FOLDER / "results", FOLDER / "REPORT.md"

HEAD = """# Benchmark report

Every figure that is committed in `benchmarks/results/`, made into tables by `python -m benchmarks.report`. Each section
names the machine, the versions, and the command that measures it again. Most were measured on small shared machines
whose speed changes within minutes: ratios from one file hold, absolute rates of two files are not comparable. What the
figures mean, and what was learnt from them, is in the documents that each section links."""


def render(results: Path = RESULTS) -> str:
    """The report of all result files; those that nobody has described here come last."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    names = [name for name in SECTIONS if name in found] + [name for name in found if name not in SECTIONS]
    parts = [HEAD, _goals({name: found[name] for name in names}), *(_section(name, found[name]) for name in names)]
    return "\n\n".join(parts) + "\n"


def _goals(found: dict[str, dict[str, Any]]) -> str:
    """All bars that were set before measuring, reached or not."""
    bars = [(name, bar) for name, result in found.items() for bar in result.get("bars", ())]
    bars += [
        (name, {"name": "its own test", "bar": "passes", "measured": None, "reached": result["passed"]})
        for name, result in found.items()
        if "passed" in result
    ]
    missed = sum(not bar["reached"] for _, bar in bars)
    rows = (
        [
            f"{name}: {_bar_name(bar)}",
            bar["bar"] if isinstance(bar["bar"], str) else f"at least {number(bar['bar'])}",
            bar["measured"],
            "yes" if bar["reached"] else "**no**",
        ]
        for name, bar in bars
    )
    head = "## What was to be reached, and what was"
    return f"{head}\n\nOf {len(bars)} goals {missed} are missed.\n\n{table(['', 'goal', 'measured', 'reached'], rows)}"


def _bar_name(bar: dict[str, Any]) -> str:
    return bar["name"] if "name" in bar else f"{bar['workload']}, {bar['ours']} over {bar['peer']}"


def _section(name: str, result: dict[str, Any]) -> str:
    section = SECTIONS.get(name) or Section(name, any_result, explained_in="")
    module = section.module or f"benchmarks.{name.partition('-')[0]}"
    source = f"[results/{name}.json](results/{name}.json), by `python -m {module}`."
    if section.explained_in:
        source += f" Explained in [docs/{section.explained_in}](../docs/{section.explained_in})."
    plots = [f"![{section.title}]({plot})" for plot in section.plots]
    return "\n\n".join([f"## {section.title}", source, _machine(result), section.render(result), *plots])


def _machine(result: dict[str, Any]) -> str:
    machine = dict(result.get("machine", {}))
    if not machine:
        return "The machine was not recorded."
    processor, cores, memory = (machine.pop(key) for key in ("processor", "cores", "memory_gib"))
    hardware = f"{processor}, {cores} cores, {memory} GiB, {machine.pop('system')}"
    device = f"; {result['device']}" if result.get("device", "CPU").lower() != "cpu" else ""
    load = result.get("load_average_before", result.get("load_average"))
    busy = f"; load average before: {number(load)}" if load is not None else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine.items())
    return f"Machine: {hardware}{device}{busy}. Versions: {versions}."


if __name__ == "__main__":
    REPORT.write_text(render())
    print(f"wrote {REPORT}")
