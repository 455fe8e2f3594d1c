"""What commands print: tables and JSON on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
    """An aligned table without rules; columns named in `left` are text, the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        side = "left" if column in left else "right"
        table.add_column(Text(printable(column)), justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # as text, and not as rich's markup
    console = _console()
    with console.capture() as capture:
        console.print(table, crop=False)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values, aligned."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print_line(f"{name:<{width}}  {value}")


def print_line(text: str) -> None:
    """One line on stdout, as it is."""
    sys.stdout.write(printable(text) + "\n")


def print_note(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(printable(text) + "\n")


def finite(value: float | None) -> float | None:
    """A number that JSON has; None in the place of nan and infinity."""
    return value if value is not None and math.isfinite(value) else None


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def size_text(nbytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def percent(error: float | None) -> str:
    """A relative error for people; below what rounding allows it is shown as that bound."""
    if error is None:
        return "unknown"
    if 0 < error < 1e-7:
        return "< 1e-5 %"
    return f"{100 * error:.2g} %" if error < 0.995 else f"{100 * error:,.0f} %"


def log_to_stderr(verbose: bool) -> None:
    """Show the library's messages: warnings always, what it does with `verbose`."""
    logging.addLevelName(logging.WARNING, "warning")
    logging.addLevelName(logging.INFO, "info")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("ema: %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True)


class _OneLine(logging.Formatter):
    """A message in one line, with the names in it escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


REPORT_SECONDS = 30.0
"""Between two lines of progress where there is no terminal for a bar."""


@contextmanager
def progress_bar(what: str, total: int, quiet: bool, verbose: bool = False) -> Iterator[Callable[[int], None]]:
    """Progress in bytes on stderr; yields a function that advances it.

    A bar with the rate and the remaining time on a terminal; elsewhere, with `verbose`, a line every 30 seconds.
    """
    console = Console(stderr=True)
    if verbose and not quiet and not console.is_terminal:
        yield ProgressLines(what, total).advance
        return
    bar = Progress(
        TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=quiet or not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A line on stderr with the time so far, where that is a terminal, as long as the block takes."""
    console = Console(stderr=True)
    line = Progress(
        SpinnerColumn(), TextColumn(what), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with line:
        line.add_task(what, total=None)
        yield


class ProgressLines:
    """Progress as a line on stderr now and then."""

    def __init__(self, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._done = 0
        self._started = self._said = clock()

    def advance(self, count: int) -> None:
        """Note that many more bytes, and say so where REPORT_SECONDS have gone by since the last line."""
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


def _console() -> Console:
    # A line is as long as it has to be: a terminal wraps it, a pipe takes it whole.
    return Console(width=10_000, no_color=not sys.stdout.isatty())
