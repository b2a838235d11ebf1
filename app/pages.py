"""Self-contained HTML pages with tables and plots. Knows how things look, not what they mean."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --dim: #6e7781; --line: #d0d7de; --mark: #1f6feb22; --tile: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --dim: #8b949e; --line: #30363d; --mark: #388bfd33; --tile: #161b22 } body { background: #0d1117 }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td { padding: .2rem 1.2rem .2rem 0; vertical-align: top; overflow-wrap: anywhere }
td:first-child { color: var(--dim); white-space: nowrap }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .8rem }
figure { margin: 0 }
img { width: 100%; display: block; background: #fff; border: 1px solid var(--line); border-radius: 6px }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem; margin: 1.2rem 0 }
.tile { background: var(--tile); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem }
.tile b { display: block; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 0 .8rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px }
pre { padding: .8rem; margin: .4rem 0; font-size: .85rem }
.block { border-bottom: 1px solid var(--line); padding: .6rem 0 1rem }
summary { cursor: pointer; margin-top: 2rem; font-size: 1.1rem; font-weight: bold }
.dim { color: var(--dim) } .mark { background: var(--mark) } .note { color: var(--dim); font-size: .85rem }
"""

Draw = Callable[[Any], None]
"""Draws on matplotlib's axes that it is given, and gives them a title."""


def page(title: str, *, note: str, parts: Iterable[str]) -> str:
    """A whole page of `parts`, which are HTML already; title and note are text."""
    return "\n".join(
        [
            "<!doctype html><html lang='en'><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style><body>",
            f"<h1>{html.escape(title)}</h1><p class='note'>{html.escape(note)}</p>",
            *parts,
            "</body></html>\n",
        ]
    )


def heading(text: str, *, note: str = "") -> str:
    return f"<h2>{html.escape(text)}</h2>" + (f"<p class='note'>{html.escape(note)}</p>" if note else "")


def table(rows: Mapping[str, object]) -> str:
    """Two columns: what, and how much. Line ends stay; None is left out."""
    cells = (
        f"<tr><td>{html.escape(name)}<td>{html.escape(_text(value)).replace(chr(10), '<br>')}</tr>"
        for name, value in rows.items()
        if value is not None
    )
    return f"<table>{''.join(cells)}</table>"


def folded(title: str, part: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{html.escape(title)}</summary>{part}</details>"


def tiles(figures: Mapping[str, str | None]) -> str:
    """The figures that matter most, large; None is left out."""
    shown = (
        f"<div class='tile'><span class='note'>{html.escape(name)}</span><b>{html.escape(value)}</b></div>"
        for name, value in figures.items()
        if value is not None
    )
    return f"<div class='tiles'>{''.join(shown)}</div>"


def ranking(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table with a header, a row for each of many."""
    head = "".join(f"<td><b>{html.escape(name)}</b>" for name in header)
    lines = ("".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def columns(texts: Mapping[str, str]) -> str:
    """Texts side by side, each under its name."""
    cells = (
        f"<div><span class='note'>{html.escape(name)}</span><pre>{html.escape(text)}</pre></div>"
        for name, text in texts.items()
    )
    return f"<div class='columns'>{''.join(cells)}</div>"


def block(part: str) -> str:
    """A part set off from the next by a line."""
    return f"<div class='block'>{part}</div>"


def figures(*draws: Draw) -> str:
    """Plots beside each other, as many as fit."""
    return f"<div class='figures'>{''.join(map(_figure, draws))}</div>"


def wide_figure(draw: Draw) -> str:
    """One plot over the page's width."""
    return _figure(draw, size=(9.4, 3.6))


def _figure(draw: Draw, size: tuple[float, float] = (4.6, 3)) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    draw(axes)
    alternative = html.escape(axes.get_title(), quote=True)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    pyplot.close(figure)
    encoded = base64.b64encode(image.getvalue()).decode()
    return f"<figure><img src='data:image/png;base64,{encoded}' alt='{alternative}'></figure>"


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
