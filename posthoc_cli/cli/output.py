"""What commands print: tables and JSON on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from posthoc_cli.errors import printable
from posthoc_cli.progress import ProgressBar

MOST_ROWS = 10
"""Rows of a table that are shown without --verbose."""


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
    """An aligned table without rules; columns named in `left` are text, the others numbers.

    On a narrow terminal the longest texts lose their middles; nothing is wrapped.
    """
    rows = _fitted(columns, rows, [index for index, column in enumerate(columns) if column in left])
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        side = "left" if column in left else "right"
        table.add_column(Text(printable(column)), justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(Text, row))  # as text, and not as rich's markup
    console = _console()
    with console.capture() as capture:
        console.print(table, crop=False)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _fitted(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int]) -> list[list[str]]:
    """The cells; those in the columns `texts` are cut so that lines fit the terminal, down to _LEAST_TEXT."""
    cells = [[printable(cell) for cell in row] for row in rows]
    room = _terminal_width() - 2 * (len(columns) - 1)
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    while texts and sum(widths) > room:
        widest = max(texts, key=widths.__getitem__)
        if widths[widest] <= max(_LEAST_TEXT, cell_len(columns[widest])):
            break
        widths[widest] -= 1
    return [
        [_without_middle(cell, width) if index in texts else cell for index, (cell, width) in enumerate(pairs)]
        for pairs in (zip(row, widths, strict=True) for row in cells)
    ]


def _without_middle(text: str, width: int) -> str:
    """Both ends of a text that is too wide: names of files differ at their ends."""
    if cell_len(text) <= width:
        return text
    head, tail = "", ""
    for character in text:
        if cell_len(head + character) > (width - 3) // 3:
            break
        head += character
    for character in reversed(text):
        if cell_len(head + character + tail) > width - 3:
            break
        tail = character + tail
    return f"{head}...{tail}"


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values, aligned; on a terminal long values are wrapped below their start."""
    width = max(len(name) for name, _ in pairs)
    indent = " " * (width + 2)
    for name, value in pairs:
        line = f"{name:<{width}}  {printable(value)}"
        room = max(_terminal_width(), 2 * len(indent))
        wrapped = textwrap.wrap(line, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        for row in wrapped if len(line) > room else [line]:
            print_line(row)


def print_line(text: str) -> None:
    """One line on stdout, as it is."""
    sys.stdout.write(printable(text) + "\n")


def print_note(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(printable(text) + "\n")


def print_rest(count: int, what: str = "") -> None:
    """Say how many rows a table lacks."""
    if count:
        print_line(f"and {count:,} more {what}".rstrip() + "; --verbose lists them")


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def largest(values: Sequence[float], everything: bool) -> list[int]:
    """Indices, growing, of the values that are listed: those of the largest size, or all."""
    order = sorted(range(len(values)), key=lambda index: -abs(values[index]))
    return sorted(order if everything else order[:MOST_ROWS])


def counted(count: int, what: str) -> str:
    """A number of things: "1 file", "1,200 files"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def size_text(nbytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def percent(error: float | None) -> str:
    """A relative error for people; tiny ones, which are rounding, as a bound."""
    if error is None:
        return "unknown"
    if 0 < error < 1e-7:
        return "< 1e-5 %"
    return f"{100 * error:.2g} %" if error < 0.995 else f"{100 * error:,.0f} %"


def log_to_stderr(verbose: bool) -> None:
    """Show the library's log: warnings, and with `verbose` information."""
    logging.addLevelName(logging.WARNING, "warning")
    logging.addLevelName(logging.INFO, "info")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("ema: %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True)


class _OneLine(logging.Formatter):
    """A message in one line, with control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


REPORT_SECONDS = 30.0
"""Between two lines of progress without a terminal."""


def progress_bar(quiet: bool = False, verbose: bool = False) -> ProgressBar:
    """Progress in bytes on stderr: a bar on a terminal; elsewhere, with `verbose`, a line every 30 seconds."""

    @contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        console = Console(stderr=True)
        if verbose and not quiet and not console.is_terminal:
            yield ProgressLines(what, total).advance
            return
        progress = Progress(
            TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=quiet or not console.is_terminal,
        )  # fmt: skip
        with progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.advance(task, count)

    return bar


@contextmanager
def working(what: str) -> Iterator[None]:
    """A line with the elapsed time on stderr, on a terminal, during the block."""
    console = Console(stderr=True)
    line = Progress(
        SpinnerColumn(), TextColumn(what), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with line:
        line.add_task(what, total=None)
        yield


class ProgressLines:
    """Progress as a line on stderr every REPORT_SECONDS."""

    def __init__(self, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._done = 0
        self._started = self._said = clock()

    def advance(self, count: int) -> None:
        """Count more bytes."""
        self._done += count
        now = self._clock()
        if now - self._said < REPORT_SECONDS:
            return
        self._said = now
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / rate if rate else 0.0
        print_note(
            f"{self._what}: {size_text(self._done)} of {size_text(self._total)}, {size_text(rate)}/s, "
            f"{left:,.0f} s remain"
        )


_LEAST_TEXT = 12
"""Columns that are left of a text in a table at least."""

_WIDE = 10_000


def _terminal_width() -> int:
    """Columns of the terminal; practically unlimited in a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDE


def _console() -> Console:
    return Console(width=_WIDE, no_color=not sys.stdout.isatty())
