"""The plot of a comparison: a panel for each figure, in each a bar for each model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.atomic import replaced_file

_PANELS = (
    ("perplexity", "perplexity", "lower is better", "{:.2f}", min),
    ("bits_per_byte", "bits per byte", "lower is better", "{:.3f}", min),
    ("rouge_l", "ROUGE-L of the answers", "higher is better", "{:.3f}", max),
    ("exact_match", "exact matches", "higher is better", "{:.1%}", max),
)
_BASE, _OTHER, _BEST = "0.75", "#8fb8de", "#1f5f9e"


def plot_comparison(file: Path, results: Sequence[dict[str, Any]], *, title: str) -> None:
    """Write `results`, each with `name`, `method` and the figures, as a PNG: the first at the top, the best dark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A figure that is nothing everywhere, as exact matches of free text are, says nothing.
    panels = [panel for panel in _PANELS if any(row[panel[0]] for row in results)]
    labels = [_label(row) for row in results]
    figure, all_axes = pyplot.subplots(
        1, len(panels), sharey=True, figsize=(2 + 2.6 * len(panels), 1.2 + 0.55 * len(results)), layout="constrained"
    )
    for axes, (key, name, direction, form, best_of) in zip(all_axes, panels, strict=True):
        values = [row[key] for row in results]
        best = best_of(values)
        colours = [
            _BEST if value == best else _OTHER if row["method"] else _BASE
            for value, row in zip(values, results, strict=True)
        ]
        bars = axes.barh(range(len(values)), values, color=colours, height=0.62)
        axes.bar_label(bars, labels=[form.format(value) for value in values], padding=4, fontsize=9)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel(direction, fontsize=8, color="0.4", loc="left")
        axes.set_xlim(0, (max(values) or 1) * 1.28)  # room for the figures at the bars' ends
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
    all_axes[0].set_yticks(range(len(labels)), labels, fontsize=9)
    all_axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    with replaced_file(file) as staging:
        figure.savefig(staging, dpi=130, format="png")
    pyplot.close(figure)


def _label(row: dict[str, Any]) -> str:
    kind = row["method"] or "no delta"
    return row["name"] if kind == row["name"] else f"{row['name']}\n({kind})"
