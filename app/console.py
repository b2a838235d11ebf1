"""What people see in the terminal: progress with rates and time left, tables, samples. Knows Rich and no job."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

console = Console(highlight=False)

Advance = Callable[..., None]
"""`advance(done, total, note="…")`"""


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        # Rich's own figure covers the last samples only, which at the end may be a single one.
        seconds = (task.finished_time or 0) - task.fields["first_s"]
        rate = (task.completed - task.fields["first"]) / seconds if task.finished and seconds > 0 else task.speed
        return Text(f"{rate:,.1f} {self.unit}/s" if rate else "", style="cyan")


class _LeftColumn(TimeRemainingColumn):
    """`3:12 left`, in the least space."""

    def __init__(self) -> None:
        super().__init__(compact=True, elapsed_when_finished=True)

    def render(self, task: Task) -> Text:
        shown = super().render(task)
        return shown if task.finished else Text.assemble(shown, " left")


@contextmanager
def progress(title: str, *, unit: str, is_compact: bool = False) -> Iterator[Advance]:
    """A progress bar with rate and time left; where no terminal is, a line at every tenth.

    `is_compact` leaves the room of a narrow terminal to the note.
    """
    if not console.is_terminal:
        yield _plain_progress(title, unit)
        return
    bar = Progress(*(_compact_columns() if is_compact else _columns(unit)), console=console)
    with bar:
        task = bar.add_task(title, total=None, note="", first=0, first_s=0.0)
        has_begun = False

        def advance(done: int, total: int | None, note: str = "") -> None:
            nonlocal has_begun
            if not has_begun and done < (total or 0):  # a resumed run starts from what was done before, after start-up
                has_begun = True
                bar.update(task, first=done, first_s=bar.tasks[0].elapsed or 0.0)
            bar.update(task, completed=done, total=total, note=note)

        yield advance


def _columns(unit: str) -> tuple[ProgressColumn, ...]:
    return (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


def _compact_columns() -> tuple[ProgressColumn, ...]:
    bar_width = max(4, min(30, console.width - 73))  # what the others take of a line, with six digits of steps
    return (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=bar_width),
        MofNCompleteColumn(),
        TextColumn("[cyan]{task.fields[note]}"),
        _LeftColumn(),
    )


def _plain_progress(title: str, unit: str) -> Advance:
    shown, first, started = -1, 0, 0.0

    def advance(done: int, total: int | None, note: str = "") -> None:
        nonlocal shown, first, started
        if not started:
            first, started = done, time.monotonic()
        tenth = 10 * done // total if total else 0
        if tenth > shown:
            shown = tenth
            seconds = (time.monotonic() - started) * (total - done) / (done - first) if total and done > first else 0
            left = f"{_clock(seconds)} left" if seconds else ""
            console.print("  ".join(filter(None, (f"{title}: {done:,}/{total:,} {unit}", note, left))))
            sys.stdout.flush()

    return advance


def _clock(seconds: float) -> str:
    """`3:12`, `1:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(title: str, rows: Mapping[str, object]) -> None:
    """Two columns: what, and how much. None values are left out. No value is cut: it may be a path to be copied."""
    shown = {name: _text(value) for name, value in rows.items() if value not in (None, "")}
    if title:
        console.print(Text(title, style="italic"), soft_wrap=True)  # a Rich title would wrap at the table's width
    if not console.is_terminal:  # whose width nobody knows: a row a line
        width = max(map(len, shown), default=0)
        for name, value in shown.items():
            console.print(Text(f"  {name:<{width}}    {value}"), soft_wrap=True)
        return
    grid = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in shown.items():
        grid.add_row(name, Text(value))
    console.print(grid)


def grid(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), last: bool = True
) -> None:
    """A table with a header; columns `right` hold figures, and the last row is a total unless `last` is false."""
    console.print(Text(title, style="italic"), soft_wrap=True)
    console.print(rich_grid(header, rows, right=right, last=last))


def rich_grid(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    last: bool = False,
    title: str | None = None,
) -> Table:
    """The table alone, to be shown by `live`."""
    shown = Table(box=None, padding=(0, 2, 0, 2), header_style="dim", title=title, title_justify="left")
    for number, name in enumerate(header):
        shown.add_column(name, justify="right" if number in right else "left")
    for number, row in enumerate(rows):
        is_total = last and number == len(rows) - 1
        shown.add_row(*map(Text, row), style="bold" if is_total else "")
    return shown


@contextmanager
def live(make: Callable[[], RenderableType]) -> Iterator[None]:
    """What `make` returns, at the bottom of the terminal and anew every second, for the block; else nothing."""
    if not console.is_terminal:
        yield
        return
    with Live(get_renderable=make, console=console, refresh_per_second=1, transient=True):
        yield


def in_bytes(size: int) -> str:
    """`1.5 MiB`; nothing for nothing."""
    if not size:
        return ""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def short_number(value: float) -> str:
    """`982`, `12.3k`, `1.2M`."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f}{unit}"
    return f"{value:.0f}"


def heading(text: str) -> None:
    console.print()
    console.print(f"[bold]{text}[/bold]")


def say(text: str, *, style: str | None = None) -> None:
    """Text as it is, without markup: it may come from a model or a document. No terminal, no wrapping."""
    console.print(Text(text, style=style or ""), soft_wrap=not console.is_terminal)


def say_parts(parts: Sequence[tuple[str, str | None]]) -> None:
    """Pieces of text, each in a style of its own."""
    console.print(Text.assemble(*((text, style or "") for text, style in parts)))


def bars(title: str, rows: Sequence[tuple[str, int]]) -> None:
    """A histogram, a bar a line."""
    longest = max((count for _, count in rows), default=0)
    console.print(Text(title, style="italic"))
    for label, count in rows:
        length = 40 * count / longest if longest else 0
        bar = "█" * int(length) + ("▌" if length % 1 >= 0.5 else "")
        console.print(Text(f"  {label:>11}  {bar} {count:,}"))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
