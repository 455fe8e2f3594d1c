"""The output of commands: tables and JSON on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import progress as live
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from posthoc_cli import errors
from posthoc_cli.errors import printable
from posthoc_cli.progress import ProgressBar

STDOUT = "standard output"
MOST_ROWS = 10
"""The number of rows that are shown of a long table; --json lists all."""
_LONGEST_WORD = 12
"""The longest word, in columns, that is never broken in a table too wide for the terminal."""


def write(text: str, flush: bool = False) -> None:
    """Write to stdout, and flush it if asked; an OSError names standard output as the file."""
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from error


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
    """Print an aligned table without rules; columns named in `left` are text, all others are numbers.

    On a narrow terminal texts and titles are wrapped, but numbers are not; nothing is cut off.
    """
    lines = [[*map(printable, line)] for line in (columns, *rows)]
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    fits = sum(widths) + 2 * (len(widths) - 1) <= _terminal_width()
    gap = 2 if fits else 1
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    total = gap * (len(widths) - 1)
    for column, *cells in zip(*lines, strict=True):
        title = column if fits else column.replace(" ", "\n")
        if column in left:
            longest = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
            min_width = min(longest, _LONGEST_WORD)
            table.add_column(Text(title), overflow="fold", min_width=min_width)
        else:
            min_width = max(map(cell_len, [*cells, *title.split("\n")]))
            table.add_column(Text(title), justify="right", no_wrap=True, min_width=min_width)
        total += min_width
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    _print(table, total)


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two aligned columns; on a terminal long values are wrapped within their column."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=max(cell_len(name) for name, _ in pairs))
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(printable(value)))
    _print(table)


def _print(table: Table, min_width: int = 0) -> None:
    """Print to stdout without trailing spaces, at least `min_width` columns wide: rich drops cells that do not fit."""
    console = Console(width=max(min_width, _terminal_width()), highlight=False)
    with console.capture() as captured:
        console.print(table, crop=False)
    for line in captured.get().splitlines():
        write(f"{line.rstrip()}\n")


def _terminal_width() -> int:
    """Return the width of the terminal in columns; practically unlimited in a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def print_line(text: str = "") -> None:
    """Print one line to stdout and flush it."""
    write(f"{printable(text)}\n", flush=True)


def print_note(text: str) -> None:
    """Print one line to stderr."""
    sys.stderr.write(f"{printable(text)}\n")


def warn_of_statistics(copies: Iterable[str]) -> None:
    """Print to stderr what to do about BatchNorm statistics, if the names of copied tensors contain any."""
    from posthoc_cli.snapshots.selection import statistics_notice

    if notice := statistics_notice(copies):
        print_note(f"ema: warning: {notice}")


def print_rest(count: int, what: str = "") -> None:
    """Print how many rows a table leaves out, if any."""
    if count > 0:
        print_line(f"and {count:,} more {what}".rstrip() + "; --json lists them")


def print_json(value: Any) -> None:
    """Print one JSON object to stdout."""
    write(f"{json.dumps(value, indent=2, allow_nan=False)}\n")


def print_report(report: Any, as_json: bool, show: Callable[..., None], *arguments: Any) -> None:
    """Print a report: as JSON (the dict itself, or its `to_dict()`), or as text by `show(report, *arguments)`."""
    if as_json:
        print_json(report if isinstance(report, dict) else report.to_dict())
    else:
        show(report, *arguments)


def print_largest(columns: Sequence[str], rows: Sequence[Sequence[str]], values: Sequence[float]) -> None:
    """Print a table of the rows whose coefficients, `values`, have the largest magnitude, in the order of the rows."""
    order = sorted(range(len(values)), key=lambda index: -abs(values[index]))
    shown = sorted(order[:MOST_ROWS])
    print_table(columns, [rows[index] for index in shown], left=columns[:1])
    print_rest(len(rows) - len(shown), "with smaller coefficients")


def counted(count: int, what: str) -> str:
    """Return a count with its noun: "1 file", "1,200 files"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def log_to_stderr() -> None:
    """Print the library's warnings to stderr, each once."""
    show = errors.EachOnce(lambda level, text: print_note(f"ema: {level}: {text}"))
    logging.basicConfig(handlers=[show], force=True)


def progress_bar(unit: str = "") -> ProgressBar:
    """Return a progress bar for a terminal's stderr, which counts bytes unless `unit` names something else."""

    @contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        in_bytes = live.DownloadColumn(), live.TransferSpeedColumn()
        numbers = (live.MofNCompleteColumn(), live.TextColumn(unit)) if unit else in_bytes
        columns = live.TextColumn(what), live.BarColumn(), *numbers, live.TimeRemainingColumn()
        with _live(*columns) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.advance(task, count)

    return bar


@contextmanager
def status_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a bar on a terminal's stderr; the yielded function takes the current action, the progress and its total."""
    words = live.TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    left = live.TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7))
    since = live.TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7))
    columns = live.BarColumn(bar_width=10, table_column=Column(min_width=10)), since, left, words
    with _live(*columns) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, most: progress.update(task, description=what, completed=done, total=most)


def _live(*columns: Any) -> live.Progress:
    console = Console(stderr=True)
    return live.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip
