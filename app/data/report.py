"""The page that `pacos inspect` writes: self-contained HTML with plots. Knows how things look, not what they mean."""

import base64
import html
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from app.atomic import write_text
from app.config.data import InspectConfig
from app.data.inspection import Inspection, Sample
from app.data.shards import REPORT

_STYLE = """
:root { color-scheme: light dark; --dim: #8a8f98; --line: #d0d7de; --loss: #1f6feb22 }
@media (prefers-color-scheme: dark) { :root { --dim: #767d88; --line: #30363d; --loss: #388bfd33 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td { padding: .2rem 1.2rem .2rem 0; vertical-align: top }
td:first-child { color: var(--dim) }
figure { display: inline-block; width: 31%; min-width: 18rem; margin: .8rem 1% 0 0 }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px }
pre { white-space: pre-wrap; border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: .4rem 0 }
.dim { color: var(--dim) } .loss { background: var(--loss) } .note { color: var(--dim); font-size: .85rem }
"""


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
    return "\n".join(
        [
            "<!doctype html><html lang='en'><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>Prepared data</title><style>{_STYLE}</style><body>",
            f"<h1>Prepared data</h1><p class='note'>{html.escape(str(inspection.manifest.folder))}</p>",
            _table(about),
            "<h2>Splits</h2>",
            _table(splits),
            f"<h2>{inspection.split.capitalize()}</h2>",
            _table(inspection.figures()),
            *(_figure(plot, inspection) for plot in plots),
            "<h2>Dropped and repaired</h2>",
            _table(left_out) if left_out else "<p>Nothing.</p>",
            "<h2>Samples</h2><p class='note'>Marked: in the loss. Grey: what the model only reads.</p>",
            *map(_sample, inspection.samples),
            "</body></html>\n",
        ]
    )


def _counted(action: str, reasons: dict[str, int]) -> dict[str, object]:
    return {f"{action}: {reason}": f"{count:,}" for reason, count in reasons.items()}


def _table(rows: dict[str, Any]) -> str:
    cells = (
        f"<tr><td>{html.escape(name)}<td>{html.escape(_text(value)).replace(chr(10), '<br>')}</tr>"
        for name, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _sample(sample: Sample) -> str:
    parts: Iterable[str] = (
        f"<span class='{'loss' if part.in_loss else 'dim'}'>{html.escape(part.text)}</span>" for part in sample.parts
    )
    note = f"{sample.num_tokens} tokens, {sample.loss_tokens} in the loss"
    trip = "the text encodes to the same ids" if sample.round_trips else "THE TEXT ENCODES TO OTHER IDS"
    return f"<pre>{''.join(parts)}</pre><p class='note'>{note}; {trip}</p>"


# --- plots ---


def _figure(plot: Callable[[Any, Inspection], None], inspection: Inspection) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.6, 3), layout="constrained")
    plot(axes, inspection)
    title = html.escape(axes.get_title(), quote=True)
    axes.grid(axis="y", alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    pyplot.close(figure)
    encoded = base64.b64encode(image.getvalue()).decode()
    return f"<figure><img src='data:image/png;base64,{encoded}' alt='{title}'></figure>"


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
