"""From runs to figures: the median run of each contender, ratios against the bars, a table and a plot."""

from pathlib import Path
from typing import Any

OURS, THROUGH_RAY = "pacos_process", "pacos_ray"
RAY_PAIRS = {(OURS, THROUGH_RAY): "what Ray Train costs",
             ("pacos_process_spare", "pacos_ray_spare"): "what Ray Train costs with a core to spare,"}  # fmt: skip
"""The same training without and with Ray, and what the difference is called."""
PEERS = ("trainer_fp32", "trainer_bf16", "pad_512", "trainer_tuned_fp32", "trainer_tuned_bf16")
SAME_START = 1e-3
"""Of losses in fp32 before any step: LoRA's B is zero then, so that none depends on how A was drawn."""


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """`report` with figures for its runs so far."""
    flops_per_s = report["task"]["flops_per_token"] / report["peak"]["flops_per_s"]
    for runs in report["runs"].values():
        for run in runs:
            if "steps" in run:
                run["tokens_per_s"] = _speed(run)
                run["mfu"] = run["tokens_per_s"] * flops_per_s
    contenders = {name: _median_run(runs) for name, runs in report["runs"].items()}
    measured = {name: run for name, run in contenders.items() if "steps" in run}
    _check_same_start(measured)
    shown = ("threads", "tokens_per_s", "mfu", "peak_bytes", "tree_peak_bytes", "computed_in", "wall_tokens_per_s",
             "trained")  # fmt: skip
    figures = {name: {key: run[key] for key in shown if key in run} for name, run in measured.items()}
    for name, run in measured.items():
        figures[name]["first_loss"] = run["steps"][0]["loss"]
        figures[name]["loss_after_a_pass"] = run["steps"][report["steps"]]["loss"]
        figures[name]["held_out_loss"] = run["held_out_loss"]
    ordered = {key: value for key, value in report.items() if key not in ("contenders", "bars", "runs")}
    return {**ordered, "contenders": figures, "bars": bars(figures), "runs": report["runs"]}


def _speed(run: dict[str, Any]) -> float:
    measured = run["steps"][1:]
    return sum(step["tokens"] for step in measured) / sum(step["seconds"] for step in measured)


def _median_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    done = [run for run in runs if "steps" in run]
    if not done:
        return runs[-1]
    return sorted(done, key=lambda run: run["tokens_per_s"])[(len(done) - 1) // 2]


def _check_same_start(measured: dict[str, dict[str, Any]]) -> None:
    """All begin at one model: their held-out losses before any step agree, and so do those of the same first records.

    Raises:
        AssertionError: somebody trains something else.
    """
    exact = {name: run for name, run in measured.items() if run["computed_in"] == "fp32"}
    _check_agree("held-out loss before any step", {name: run["held_out_loss"]["0"] for name, run in exact.items()})
    same_records = ("trainer_tuned_fp32", "pacos_process_padded")  # the others drop units, or label all, or are packed
    _check_agree("first step's loss", {name: exact[name]["steps"][0]["loss"] for name in same_records if name in exact})
    same_rows = [name for pair in RAY_PAIRS for name in pair]
    _check_agree("first packed loss", {name: exact[name]["steps"][0]["loss"] for name in same_rows if name in exact})
    trained = {name: run["trained"] for name, run in measured.items()}
    assert len(set(trained.values())) <= 1, f"the contenders train unequal numbers of weights: {trained}"


def _check_agree(what: str, losses: dict[str, float]) -> None:
    if losses and max(losses.values()) - min(losses.values()) > SAME_START:
        raise AssertionError(f"{what} differs by more than {SAME_START}: {losses}")


def bars(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, as far as it has been measured."""
    return [*_bars_over_peers(figures), *_bars_of_ray(figures)]


def _bars_over_peers(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    if OURS not in figures:
        return []
    ours, found = figures[OURS], []

    def add(name: str, bar: str, measured: float, reached: bool) -> None:
        found.append({"name": name, "bar": bar, "measured": measured, "reached": reached})

    speed = {name: ours["tokens_per_s"] / figures[name]["tokens_per_s"] for name in PEERS if name in figures}
    if "trainer_fp32" in figures:
        ratio, memory = speed["trainer_fp32"], ours["peak_bytes"] / figures["trainer_fp32"]["peak_bytes"]
        add("tokens/s over Trainer's in fp32", "at least 15", ratio, ratio >= 15)
        add("peak memory over Trainer's in fp32", "at most 0.1", memory, memory <= 0.1)
    if "trainer_bf16" in figures:
        add("tokens/s over Trainer's with bf16 autocast", "at least 7", ratio := speed["trainer_bf16"], ratio >= 7)
    if speed:
        best = min(speed, key=lambda name: speed[name])
        add(f"tokens/s over the best peer's, {best}", "at least 2", speed[best], speed[best] >= 2)
    return found


def _bars_of_ray(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for (plain, through), name in RAY_PAIRS.items():
        if plain not in figures or through not in figures:
            continue
        for key, where in (("tokens_per_s", "in the steps"), ("wall_tokens_per_s", "by the clock")):
            cost = 1 - figures[through][key] / figures[plain][key]
            found.append({"name": f"{name} {where}", "bar": "below 0.05", "measured": cost, "reached": cost < 0.05})
    return found


def table(report: dict[str, Any]) -> str:
    """The contenders as a Markdown table."""
    lines = [
        "| | non-padding tokens/s | MFU | peak memory | all processes' | computed in | loss, first → after a pass |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in report["contenders"].items():
        lines.append(
            f"| {name} | {run['tokens_per_s']:.0f} | {100 * run['mfu']:.1f} % | {run['peak_bytes'] / 2**30:.2f} GiB | "
            f"{run['tree_peak_bytes'] / 2**30:.2f} GiB | {run['computed_in']} | "
            f"{run['first_loss']:.3f} → {run['loss_after_a_pass']:.3f} |"
        )
    return "\n".join(lines)


def plot(report: dict[str, Any], file: Path) -> None:
    """Speed and memory, a bar for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(report["contenders"])
    colors = ["tab:blue" if name.startswith("pacos") else "0.65" for name in names]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 0.5 + 0.45 * len(names)), layout="constrained", sharey=True)
    values = (
        ("non-padding tokens per second", [run["tokens_per_s"] for run in report["contenders"].values()]),
        ("peak memory, GiB", [run["peak_bytes"] / 2**30 for run in report["contenders"].values()]),
    )
    for axes, (label, figures) in zip(panels, values, strict=True):
        drawn = axes.barh(names, figures, color=colors)
        axes.bar_label(drawn, fmt="%.3g", padding=3)
        axes.set(xlabel=label)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(f"LoRA of GPT-2 124M, 16 Alpaca records a step, {report['threads']} threads")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
