"""What commands print: tables and JSON on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
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
"""Rows of a long table that are shown; --json has all."""
_LONGEST_WORD = 12
"""Columns of a word that is not wrapped within, in a table that is too wide for the terminal."""


def write(text: str, flush: bool = False) -> None:
    """Write to stdout; an OSError names it."""
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from error


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
    """An aligned table without rules; columns named in `left` are text, the others numbers.

    On a narrow terminal texts and titles are wrapped; a number never is, and nothing is cut off.
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
            least = min(longest, _LONGEST_WORD)
            table.add_column(Text(title), overflow="fold", min_width=least)
        else:
            least = max(map(cell_len, [*cells, *title.split("\n")]))
            table.add_column(Text(title), justify="right", no_wrap=True, min_width=least)
        total += least
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    _print(table, total)


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values, aligned; on a terminal long values are wrapped below their start."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=max(cell_len(name) for name, _ in pairs))
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(printable(value)))
    _print(table)


def _print(table: Table, least: int = 0) -> None:
    """On stdout, without spaces at the ends of lines; `least` columns wide, since rich drops what has no room."""
    console = Console(width=max(least, _terminal_width()), highlight=False)
    with console.capture() as captured:
        console.print(table, crop=False)
    for line in captured.get().splitlines():
        write(f"{line.rstrip()}\n")


def _terminal_width() -> int:
    """Columns of the terminal; practically unlimited in a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def print_line(text: str = "") -> None:
    """One line on stdout, flushed."""
    write(f"{printable(text)}\n", flush=True)


def print_note(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{printable(text)}\n")


def warn_of_statistics(copies: Iterable[str]) -> None:
    """Say on stderr what to do about the running statistics among the names of copies."""
    from posthoc_cli.snapshots.selection import statistics_notice

    if notice := statistics_notice(copies):
        print_note(f"ema: warning: {notice}")


def print_rest(count: int, what: str = "") -> None:
    """Say how many rows a table lacks."""
    if count > 0:
        print_line(f"and {count:,} more {what}".rstrip() + "; --json lists them")


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    write(f"{json.dumps(value, indent=2, allow_nan=False)}\n")


def print_report(report: Any, as_json: bool, show: Callable[..., None], *arguments: Any) -> None:
    """A report: itself or what its `to_dict` gives as JSON, or for people by `show`, with these arguments."""
    if as_json:
        print_json(report if isinstance(report, dict) else report.to_dict())
    else:
        show(report, *arguments)


def print_outcome(things: Sized, done: bool, dry_run: bool, would: str, did: str, past: str) -> None:
    """Say what a command that changes files has done to `things`, or would do; `past` is its verb."""
    if not things:
        print_line(f"nothing has to be {past}")
    elif done:
        print_line(did)
    else:
        print_line(f"would {would}; " * dry_run + f"nothing was {past}")


def print_largest(columns: Sequence[str], rows: Sequence[Sequence[str]], values: Sequence[float]) -> None:
    """A table of the rows whose values, the coefficients, are largest in size, in the order of the rows."""
    order = sorted(range(len(values)), key=lambda index: -abs(values[index]))
    shown = sorted(order[:MOST_ROWS])
    print_table(columns, [rows[index] for index in shown], left=columns[:1])
    print_rest(len(rows) - len(shown), "with smaller coefficients")


def counted(count: int, what: str) -> str:
    """A number of things: "1 file", "1,200 files"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def log_to_stderr() -> None:
    """Show the library's warnings, each once."""
    show = errors.EachOnce(lambda level, text: print_note(f"ema: {level}: {text}"))
    logging.basicConfig(handlers=[show], force=True)


def progress_bar(unit: str = "") -> ProgressBar:
    """Progress on a terminal's stderr, in bytes if no other `unit`."""

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
def standing() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on a terminal's stderr, and the function that says what is done, and how many of how many are."""
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
