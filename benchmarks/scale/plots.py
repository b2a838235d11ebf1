"""The simulation's pictures."""

from pathlib import Path
from typing import Any

BLUE, RED, GREY = "#2a6f97", "#d1495b", "#8d99ae"


def draw(scenarios: dict[str, Any], folder: Path) -> None:
    """`scale-sizes.png` and `scale-load.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8))
    _sizes(axes, scenarios["sizes"])
    _save(figure, axes, folder / "scale-sizes.png")
    figure, axes = plt.subplots(2, 3, figsize=(14, 6.4))
    _day(axes[:, 0], scenarios["day"])
    _crowd(axes[:, 1], scenarios["crowd"], ("CPU, shipped", "CPU, target_queued_s 40"))
    _crowd(axes[:, 2], scenarios["crowd"], ("large, batches of 256", "large, shipped"))
    _save(figure, axes.flat, folder / "scale-load.png")


def _sizes(axes: Any, sizes: dict[str, Any]) -> None:
    rate, latency, path = axes
    for found, color, label in zip(sizes.values(), (BLUE, RED), ("GPT-2 124M, CPU", "7e9, H200"), strict=True):
        for name, line in (("enough", "-o"), ("shipped", ":x")):
            rows = [row for row in found["rows"] if row["path"] == name]
            counts = [row["replicas"] for row in rows]
            title = f"{label}, {'one proxy, four ingresses' if name == 'shipped' else 'as many as it takes'}"
            rate.plot(counts, [row["delivered_per_s"] for row in rows], line, color=color, label=title)
            latency.plot(counts, [row["first_token_p99_s"] for row in rows], line, color=color)
            if name == "enough":
                path.plot(counts, [row["proxies"] for row in rows], "-o", color=color, label=f"{label}: proxies")
                path.plot(counts, [row["ingresses"] for row in rows], "--s", color=color, label=f"{label}: ingresses")
    rate.set(title="delivered", ylabel="tokens/s")
    latency.set(title="first token, 99 % within", ylabel="s")
    path.set(title="what it takes before them", ylabel="processes")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="generator replicas")
    rate.legend(fontsize=7)
    path.legend(fontsize=7)


def _day(axes: Any, runs: dict[str, Any]) -> None:
    load, replicas = axes
    series = runs["shipped"]["series"]
    hours = [row["t"] / 3600 for row in series]
    replicas.step(hours, [row["target"] for row in series], color=RED)
    load.plot(hours, [row["rate"] for row in series], color=GREY)
    load.set(title="a day", ylabel="requests/s")
    replicas.set(xlabel="h", ylabel="replicas")


def _crowd(axes: Any, runs: dict[str, Any], names: tuple[str, str]) -> None:
    waiting, replicas = axes
    for name, color in zip(names, (RED, BLUE), strict=True):
        series = runs[name]["series"]
        minutes = [row["t"] / 60 for row in series]
        waiting.plot(minutes, [row["waiting"] for row in series], color=color, label=f"waiting: {name}")
        replicas.step(minutes, [row["target"] for row in series], color=color, label=name)
    rate = waiting.twinx()
    rate.plot(minutes, [row["rate"] for row in series], color=GREY, linewidth=1)
    rate.set_ylabel("requests/s", color=GREY)
    waiting.set(title="ten times the load for ten minutes", ylabel="requests that wait")
    replicas.axhline(runs[names[0]]["needed"], color=GREY, linewidth=1, linestyle="--", label="what the crowd needs")
    replicas.set(xlabel="min", ylabel="replicas")
    waiting.legend(fontsize=7)
    replicas.legend(fontsize=7)


def _save(figure: Any, axes: Any, file: Path) -> None:
    import matplotlib.pyplot as plt

    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
