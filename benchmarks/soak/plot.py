"""A soak's picture."""

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.soak.verdict import MAX_GROWTH, WARM_UP, after

COLORS = {"generator": "#2a6f97", "ingress": "#d1495b", "documents": "#edae49", "retriever": "#66a182",
          "RayTrainWorker": "#7b4b94"}  # fmt: skip
GREY = "#c3c9d5"
KIND_COLORS = ("#2a6f97", "#61a5c2", "#66a182", "#d1495b", "#edae49")


def draw(report: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    file.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    _memory(axes[0], axes[1], report)
    _latencies(axes[2], report)
    for axis in axes:
        axis.axvline(WARM_UP * report["minutes"], color=GREY, linestyle=":")
        axis.set_xlabel("minutes")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _memory(absolute: Any, relative: Any, report: dict[str, Any]) -> None:
    """Of every process that was there from the end of the warm-up to the end of all."""
    moments = report["memory"]["elapsed_s"]
    minutes = [moment / 60 for moment in moments]
    for process, values in report["memory"]["mib"].items():
        settled = after(moments, values, WARM_UP * 60 * report["minutes"])
        name = next((name for name in COLORS if name in process), None)
        style = {"color": COLORS[name], "zorder": 2} if name else {"color": GREY, "zorder": 1, "linewidth": 0.8}
        if name and name not in absolute.get_legend_handles_labels()[1]:
            style["label"] = name
        level = median(settled[: max(1, len(settled) // 10)])
        shares = [None if value is None else 100 * (value / level - 1) for value in values]
        absolute.plot(minutes, values, **style)
        relative.plot(minutes, [share if share is None else max(share, -30) for share in shares], **style)
    for edge in (-100 * MAX_GROWTH, 100 * MAX_GROWTH):
        relative.axhline(edge, color="black", linewidth=0.8, linestyle="--")
    absolute.set(title="memory of each process", ylabel="MiB", yscale="log")
    relative.set(title="against its level after the warm-up", ylabel="%", ylim=(-30, 15))
    if absolute.get_legend_handles_labels()[1]:
        absolute.legend(fontsize=7)


def _latencies(axis: Any, report: dict[str, Any]) -> None:
    for (kind, answers), color in zip(report["answers"].items(), KIND_COLORS, strict=False):
        axis.plot(answers["minutes"], [1000 * took for took in answers["median_s"]], color=color, label=kind)
    axis.set(title="answers, median", ylabel="ms", yscale="log")
    axis.legend(fontsize=7)
