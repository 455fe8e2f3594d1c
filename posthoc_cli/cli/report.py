"""`ema report`: a page about runs and sweeps."""

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
        [], metavar="DIR", help="The directory that the tracker wrote, or of checkpoints; several are compared."
    ),
    sweep: list[Path] = values.RUN(
        [], metavar="DIR", help="The folder of a sweep of such a run, as ema sweep wrote it; again for another one."
    ),
    checkpoints: str | None = values.CHECKPOINTS,
    out: Path = values.OUTPUT("report.html", "--out", "-o", help="The page."),
    watch: bool = values.flag(
        values.OUTPUT,
        "--watch",
        help="Make the page again when snapshots or trials appear, until Ctrl-C. It reloads by itself meanwhile.",
    ),
    overwrite: bool = values.OVERWRITE,
    as_json: bool = values.JSON,
) -> None:
    """Make a page about a run and its best length.

    One HTML file that needs no network: what the run is, the metric against the length with its noise, how exact each
    length is, how the network moved, all trials, and the commands to repeat it. Several runs or sweeps are compared.
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
    files.write_whole(page, text, overwrite)
    if as_json:
        output.print_json({"output": str(page), "bytes": len(text)})
    else:
        output.print_line(f"wrote {page}")


_TICK = 2
"""Seconds between looks at the directories, and between reloads of a page."""


def _watch(runs: list[Run], sweeps: list[Path], page: Path) -> NoReturn:
    """Write the page whenever something has changed, until interrupted; then so that it reloads no longer."""
    from posthoc_cli.report import render
    from posthoc_cli.sweep.results import RESULT

    def write(reload: int | None) -> None:
        swept = [folder for folder in sweeps if (folder / RESULT).exists()]
        files.write_whole(page, render(runs, swept, page, reload).encode(), overwrite=True)

    seen: object = None
    try:
        while True:
            now = [_state(folder) for folder in (*(run.directory for run in runs), *sweeps)]
            if now != seen:
                seen = now
                try:
                    write(_TICK)
                    output.print_line(f"wrote {page}")
                except (DirectoryError, VanishedError) as error:  # none are there yet, or one was thinned away
                    output.print_note(f"ema: waiting: {error}")
            time.sleep(_TICK)
    finally:
        with suppress(DirectoryError, VanishedError):
            write(None)


def _state(folder: Path) -> set[tuple[str, int]]:
    """Names and times of what is in a folder."""
    with suppress(FileNotFoundError):
        return {(one.name, one.stat().st_mtime_ns) for one in folder.iterdir() if not one.name.startswith(".")}
    return set()
