"""`ema report`: an HTML page about runs and sweeps."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from typer import Argument

from posthoc_cli import files
from posthoc_cli.cli import output, values
from posthoc_cli.errors import DirectoryError, InvalidValueError, VanishedError, check_alone

if TYPE_CHECKING:
    from posthoc_cli.run import Run

EPILOG = (
    "Example:  ema report run/ema --sweep sweep --out report.html   or   "
    "ema report run/a run/b --sweep sweep-a --sweep sweep-b"
)


def report(
    directories: list[Path] = Argument(
        [], metavar="DIR", help="A directory of snapshots or of checkpoints; several are compared."
    ),
    sweep: list[Path] = values.RUN(
        [], metavar="DIR", help="The folder that ema sweep has written for such a run. Repeatable."
    ),
    checkpoints: str | None = values.CHECKPOINTS,
    out: Path = values.OUTPUT("report.html", "--out", "-o", help="The page."),
    watch: bool = values.flag(
        values.OUTPUT,
        "--watch",
        help="Update the page when snapshots or trials appear, until Ctrl-C; the open page reloads by itself.",
    ),
    overwrite: bool = values.OVERWRITE,
    as_json: bool = values.JSON,
) -> None:
    """Make a page about a run and its best length.

    Writes one HTML file that needs no network: what the run is, the metric against the length with its noise, how exact
    each length is, how the network moved, all trials, and the commands to repeat them. Several runs or sweeps are
    compared.
    """
    from posthoc_cli.report import render
    from posthoc_cli.run import new_file

    page = new_file(out, (".html",), overwrite)
    runs = values.open_runs(directories, checkpoints)
    folders = [files.expanded(folder) for folder in sweep]
    check_alone(watch=watch, as_json=as_json)
    if watch:
        for run in runs:
            if not run.directory.is_dir():
                raise InvalidValueError("--watch", "needs a directory, and not a pattern", value=run.directory)
        _watch(runs, folders, page)
    text = render(runs, folders, page).encode()
    files.write_atomically(page, text, overwrite)
    if as_json:
        output.print_json({"output": str(page), "bytes": len(text)})
    else:
        output.print_line(f"wrote {page}")


_TICK = 2
"""Seconds between checks of the directories, and between reloads of a page."""


def _watch(runs: list[Run], sweeps: list[Path], page: Path) -> NoReturn:
    """Write the page whenever a directory has changed, until interrupted; the last version does not reload itself."""
    from posthoc_cli.report import render
    from posthoc_cli.sweep.results import RESULT

    def write(reload: int | None) -> None:
        finished = [folder for folder in sweeps if (folder / RESULT).exists()]
        files.write_atomically(page, render(runs, finished, page, reload).encode(), overwrite=True)

    rendered: object = None
    try:
        while True:
            states = [_state(folder) for folder in (*(run.directory for run in runs), *sweeps)]
            if states != rendered:
                rendered = states
                try:
                    write(_TICK)
                    output.print_line(f"wrote {page}")
                except (DirectoryError, VanishedError) as error:  # no snapshot yet, or one was thinned meanwhile
                    output.print_note(f"ema: waiting: {error}")
            time.sleep(_TICK)
    finally:
        with suppress(DirectoryError, VanishedError):
            write(None)


def _state(folder: Path) -> set[tuple[str, int]]:
    """Return the names and modification times of the files in a folder, apart from hidden ones."""
    with suppress(FileNotFoundError):
        return {(path.name, path.stat().st_mtime_ns) for path in folder.iterdir() if not path.name.startswith(".")}
    return set()
