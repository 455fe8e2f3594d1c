"""The output of commands: tables and JSON on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import progress as live
from rich.cells import cell_len
from rich.console import Console

from posthoc_cli import errors, files
from posthoc_cli.errors import printable
from posthoc_cli.progress import ProgressBar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STDOUT = "standard output"
MOST_ROWS = 10
"""The number of rows that are shown of a long table; --json lists all."""


def write(text: str, flush: bool = False) -> None:
    """Write to stdout, and flush it if asked; an OSError names standard output as the file."""
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from error


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
    """Print an aligned table without rules; columns named in `left` are text, all others are numbers."""
    lines = [[*map(printable, line)] for line in (columns, *rows)]
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        padded = []
        for title, cell, width in zip(columns, line, widths, strict=True):
            space = " " * (width - cell_len(cell))
            padded.append(cell + space if title in left else space + cell)
        write(f"{'  '.join(padded).rstrip()}\n")


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two aligned columns."""
    width = max(cell_len(name) for name, _ in pairs)
    for name, value in pairs:
        write(f"{name}{' ' * (width - cell_len(name))}  {printable(value)}\n")


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


def write_picture(draw: Callable[[], Figure], path: Path, overwrite: bool) -> None:
    """Write a figure to a file, which appears complete or not at all."""
    from posthoc_cli import plots

    files.write_atomically(path, plots.as_file(draw, path.suffix), overwrite)


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
        console = Console(stderr=True)
        hidden, redirected = not console.is_terminal, sys.stdout.isatty()
        with live.Progress(
            *columns, console=console, transient=True, disable=hidden, redirect_stdout=redirected
        ) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.advance(task, count)

    return bar
