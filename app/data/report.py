"""The page that `pacos inspect` writes about prepared data."""

import functools
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from app import pages
from app.atomic import write_text
from app.config.data import InspectConfig
from app.data.inspection import Inspection, Sample
from app.data.shards import REPORT


def write_report(inspection: Inspection, config: InspectConfig) -> Path:
    """Write the page, in one step; returns where.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(config.report) if config.report else Path(config.data) / REPORT
    write_text(path, _page(inspection))
    return path


def _page(inspection: Inspection) -> str:
    values = inspection.manifest.values
    sources = [f"{source['name']} ({source['rows']:,} records, {source['format']})" for source in values["sources"]]
    about = {
        "sources": "\n".join(sources),
        "template": values["template"]["type"],
        "tokenizer": f"{values['config']['model']}, {values['vocab_size']:,} entries",
        "layout": " ".join(str(part) for part in values["config"]["layout"].values()),
        "seed": values["config"]["seed"],
        "pacos": values["version"],
    }
    splits = {
        name: f"{split['records']:,} records, {split['tokens']:,} tokens, {split['loss_tokens']:,} in the loss"
        for name, split in values["splits"].items()
        if split["records"]
    }
    left_out = {**_counted("dropped", values["rejected"]), **_counted("repaired", values["repaired"])}
    plots = [_lengths_plot, _loss_plot, _rows_plot] if inspection.row_capacity else [_lengths_plot, _loss_plot]
    parts = [
        pages.table(about),
        pages.heading("Splits"),
        pages.table(splits),
        pages.heading(inspection.split.capitalize()),
        pages.table(inspection.figures()),
        pages.figures(*(functools.partial(plot, inspection=inspection) for plot in plots)),
        pages.heading("Dropped and repaired"),
        pages.table(left_out) if left_out else "<p>Nothing.</p>",
        pages.heading("Samples", note="Marked: in the loss. Grey: what the model only reads."),
        *map(_sample, inspection.samples),
    ]
    return pages.page("Prepared data", note=str(inspection.manifest.folder), parts=parts)


def _counted(action: str, reasons: dict[str, int]) -> dict[str, object]:
    return {f"{action}: {reason}": f"{count:,}" for reason, count in reasons.items()}


def _sample(sample: Sample) -> str:
    parts: Iterable[str] = (
        f"<span class='{'mark' if part.in_loss else 'dim'}'>{html.escape(part.text)}</span>" for part in sample.parts
    )
    note = f"{sample.num_tokens} tokens, {sample.loss_tokens} in the loss"
    trip = "the text encodes to the same ids" if sample.round_trips else "THE TEXT ENCODES TO OTHER IDS"
    return f"<pre>{''.join(parts)}</pre><p class='note'>{note}; {trip}</p>"


# --- plots ---


def _lengths_plot(axes: Any, inspection: Inspection) -> None:
    axes.hist(inspection.lengths, bins=50, color="tab:blue")
    for percent, style in ((50, "-"), (95, "--")):
        value = np.percentile(inspection.lengths, percent)
        axes.axvline(value, color="0.3", linestyle=style, linewidth=1, label=f"{percent} % below {value:.0f}")
    axes.set(xlabel="tokens a record", ylabel="records", title="Lengths")
    axes.legend()


def _loss_plot(axes: Any, inspection: Inspection) -> None:
    shares = inspection.loss_lengths / inspection.lengths
    axes.hist(100 * shares, bins=np.linspace(0, 100, 41), color="tab:green")
    axes.set(xlabel="% of a record's tokens in the loss", ylabel="records")
    axes.set_title(f"In the loss: {inspection.loss_share:.1%} of all tokens")


def _rows_plot(axes: Any, inspection: Inspection) -> None:
    axes.hist(100 * inspection.row_lengths / (inspection.row_capacity or 1), bins=40, color="tab:purple")
    axes.set(xlabel="% of a row that is filled", ylabel="rows", title=f"Rows filled: {inspection.fill:.1%}")
