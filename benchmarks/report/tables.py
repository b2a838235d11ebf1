"""Numbers and tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

GIB, MIB = 2**30, 2**20


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The first column holds names, the others numbers, None where nothing was measured."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def number(value: float) -> str:
    """Three or four digits that say something: 1,234, 56.7, 0.0891."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(ours: float | None, theirs: float | None) -> str | None:
    return f"{number(ours / theirs)} ×" if ours and theirs else None


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def mib(size: float) -> str:
    return f"{size / MIB:,.0f} MiB"


def milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{number(1000 * seconds)} ms"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, int | float) else str(value).replace("|", "\\|")
