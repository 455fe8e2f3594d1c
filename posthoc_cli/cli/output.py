"""What commands print: tables and JSON on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
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

from posthoc_cli.cli.values import existing_directory
from posthoc_cli.errors import printable

if TYPE_CHECKING:
    from posthoc_cli.snapshots.measurements import Likeness

MOST_ROWS = 10
"""Rows of a list that are shown unless all are asked for."""


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
    """An aligned table without rules; columns named in `left` are text, the others numbers.

    On a terminal that is too narrow for it the longest texts lose their middles; nothing is wrapped.
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
    """The cells, those in the columns `texts` cut so that lines fit the terminal, if that leaves anything of them."""
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
    """Both ends of a text that is wider: what tells files apart is in their names' ends."""
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
    """Names and values, aligned; on a terminal long values go on in further lines, below where they begin."""
    width = max(len(name) for name, _ in pairs)
    indent = " " * (width + 2)
    for name, value in pairs:
        line = f"{name:<{width}}  {printable(value)}"
        room = max(_terminal_width(), 2 * len(indent))
        wrapped = textwrap.wrap(line, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        for part in wrapped if len(line) > room else [line]:
            print_line(part)


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


_LEAST_TEXT = 12
"""A text in a table is not cut below that."""

_WIDE = 10_000


def _terminal_width() -> int:
    """Columns of the terminal; in a pipe a line is as long as it has to be."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDE


def _console() -> Console:
    return Console(width=_WIDE, no_color=not sys.stdout.isatty())


# --- What predicted errors rest on before training: an even movement, or that of an earlier run ----


LikeOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Snapshots of an earlier run that the network will move like. [default: evenly]"),
]

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""Short words for the dtypes that a plan chooses from."""


def read_likeness(like: Path | None, steps: int) -> Likeness:
    """What the earlier run says about one of so many steps; nothing where there is none.

    Raises:
        FileFormatError, MismatchError: as `read_directory`.
    """
    from posthoc_cli.snapshots.directory import read_directory
    from posthoc_cli.snapshots.measurements import Likeness, likeness

    return Likeness(None, {}) if like is None else likeness(read_directory(existing_directory(like)), steps)


def assumption_text(like: Path | None, earlier: Likeness) -> str:
    """What is assumed, to follow "if": "the network moves evenly"."""
    from posthoc_cli.planning import EVENLY

    if like is None:
        return EVENLY
    if earlier.motion is None:
        return f"{EVENLY}: {like} does not tell how it moved"
    return f"the network moves as in {like}"
