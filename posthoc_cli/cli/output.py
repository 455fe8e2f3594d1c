"""The output of commands: tables and JSON on stdout, progress and messages on stderr."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import progress as live
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from posthoc_cli import errors, files
from posthoc_cli.errors import count_noun, escape_text, list_first
from posthoc_cli.report.facts import make_title, text
from posthoc_cli.resources import ProgressBar, no_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STDOUT = "standard output"
warnings: list[str] = []  # what the command has warned of
MOST_ROWS = 10  # the number of rows that are shown of a long table; --json lists all


def write(text: str, flush: bool = False) -> None:
    """Write to stdout, and flush it if asked; an OSError names standard output as the file."""
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from error


def print_line(text: str = "") -> None:
    """Print one line to stdout and flush it."""
    write(f"{escape_text(text)}\n", flush=True)


def print_note(text: str) -> None:
    """Print one line to stderr; a stream that is full changes no result or exit code."""
    try:
        sys.stderr.write(f"{escape_text(text)}\n")
    except BrokenPipeError:
        raise
    except OSError:
        pass


def print_json(value: Any) -> None:
    """Print one JSON object to stdout."""
    write(f"{json.dumps(value, indent=2, allow_nan=False)}\n")


def show(
    report: dict[str, Any],
    as_json: bool,
    as_text: Callable[[dict[str, Any]], None],
    wrote: Path | None = None,
) -> None:
    """Print a report's `to_dict`: as JSON, with the warnings, or by a function that prints the same
    fields as text, and a file's path."""
    if as_json:
        print_json(report | {"warnings": warnings})
        return
    as_text(report)
    if wrote is not None:
        print_line(f"wrote {wrote}")


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
) -> None:
    """Print rows of a report as an aligned table, numbers to the right.

    Arguments:
        columns: the key of each column, or its title and key as "size:bytes"; a cell is empty if
            its row lacks the key.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    pairs = []
    for column in columns:
        title, separator, key = column.rpartition(":")
        if not separator:
            title = make_title(key)
        pairs.append((title, key))
    for title, key in pairs:
        values = [row.get(key, 0) for row in rows]
        is_number = all(isinstance(value, int | float | None) for value in values)
        side: JustifyMethod = "right" if is_number else "left"
        table.add_column(Text(title), justify=side, no_wrap=True)
    for row in rows:
        cells = []
        for _, key in pairs:
            cell = text(key, row[key]) if key in row else ""
            cells.append(Text(escape_text(cell)))
        table.add_row(*cells)
    drawn = io.StringIO()
    # as wide as its cells, also in a narrow terminal: lines can be searched and copied
    console = Console(file=drawn, width=sys.maxsize, color_system=None)
    console.print(table)
    for line in drawn.getvalue().splitlines():
        write(f"{line.rstrip()}\n")


def print_some(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
) -> None:
    """Print a table like `print_rows`, after an empty line; of a long one the first and the last
    rows."""
    print_line()
    if len(rows) <= MOST_ROWS:
        print_rows(rows, columns)
        return
    half = MOST_ROWS // 2
    print_rows([*rows[:half], *rows[-half:]], columns)
    print_line(f"and {len(rows) - MOST_ROWS:,} more rows; --json lists them")


def print_coefficients(snapshots: Sequence[Mapping[str, Any]]) -> None:
    """Print the snapshots of an average whose coefficients have the largest magnitude, in their
    order."""
    sizes = [-abs(snapshot["coefficient"]) for snapshot in snapshots]
    by_size = sorted(range(len(sizes)), key=sizes.__getitem__)
    largest = sorted(by_size[:MOST_ROWS])
    rows = [snapshots[index] for index in largest]
    print_rows(rows, ["file", "coefficient"])
    left = len(snapshots) - len(rows)
    if left:
        print_line(f"and {left:,} more rows with smaller coefficients; --json lists them")


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two aligned columns."""
    width = max(cell_len(name) for name, _ in pairs)
    for name, value in pairs:
        space = " " * (width - cell_len(name))
        write(f"{name}{space}  {escape_text(value)}\n")


def write_picture(
    draw: Callable[[], Figure],
    path: Path,
    overwrite: bool,
) -> None:
    """Write a figure to a file, which appears complete or not at all, and make its folder."""
    from posthoc_cli import plots

    picture = plots.as_file(draw, path.suffix)
    with files.new_directory(path.parent):
        files.write_atomically(path, picture, overwrite)


def list_tensors(names: list[str]) -> str:
    """Count tensors and name the first ones."""
    return f"{count_noun(len(names), 'tensor')} ({list_first(names, 3)})"


def note_copied(copied: dict[str, Any]) -> None:
    """Print what a copy of a checkpoint has from the average, and what of the checkpoint."""
    name = Path(copied["path"]).resolve().name
    if copied["replaced"] == "average":
        what = "the average is replaced; the weights stay as they are"
    else:
        what = "the weights are replaced"
    print_note(f"a copy of {name}, in which {what}")
    if kept := copied["kept"]:
        print_note(f"kept {list_tensors(kept)} of {name}, which the run does not have")
    if shared := copied["shared"]:
        print_note(f"not written: {list_tensors(shared)}; {name} has the weights of these alone")
    if not_copied := copied["not_copied"]:
        print_note(f"not copied: {list_first(not_copied)}")
    if copied["has_tracker"]:
        text = "the tracker's state in the copy is that of the training"
        if copied["replaced"] == "weights":
            text += ", not of the new weights: a resume from the copy will say so"
        print_note(text)


def log_to_stderr() -> None:
    """Print the library's warnings to stderr, each once, and notices: what it has found in
    checkpoints, and what outputs have as copies."""
    show = errors.EachOnce(_print_message, logging.INFO)
    for room in ("checkpoints", "snapshots", "synthesis"):
        logging.getLogger(f"posthoc_cli.{room}").setLevel(logging.INFO)
    # which prints its messages itself
    show.addFilter(lambda record: not record.name.startswith("huggingface_hub"))
    logging.basicConfig(handlers=[show], force=True)


def _print_message(level: str, text: str) -> None:
    begin = "" if level == "info" else f"ema: {level}: "
    print_note(begin + text)


def progress_bar(unit: str = "") -> ProgressBar:
    """Make a progress bar for a terminal's stderr, which counts bytes unless `unit` names something
    else."""

    @contextmanager
    def bar(
        what: str,
        total: int,
    ) -> Iterator[Callable[[int], None]]:
        if not sys.stderr.isatty():  # `Console.is_terminal` follows FORCE_COLOR
            with no_bar(what, total) as advance:
                yield advance
            return
        columns: list[live.ProgressColumn] = [live.TextColumn(what), live.BarColumn()]
        if unit:
            columns += [live.MofNCompleteColumn(), live.TextColumn(unit)]
        else:
            columns += [live.DownloadColumn(), live.TransferSpeedColumn()]
        columns.append(live.TimeRemainingColumn())
        redirected = sys.stdout.isatty()
        with live.Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=redirected,
        ) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.advance(task, count)

    return bar
