"""`ema report`: a page about a run and a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from typer import Option

from posthoc_cli import files
from posthoc_cli.cli import output, values

if TYPE_CHECKING:
    from posthoc_cli.checkpoints.opening import Origin

EPILOG = "Example:  ema report run/ema --sweep sweep --out report.html"


@values.with_origin
def report(
    directory: Path | None = values.DIRECTORY_OR_CHECKPOINTS,
    checkpoints: str | None = values.CHECKPOINTS,
    sweep: Path | None = Option(None, metavar="DIR", help="The folder of a sweep of this run, as ema sweep wrote it."),
    out: Path = Option("report.html", "--out", "-o", help="The page."),
    overwrite: bool = values.FORCE,
    *,
    origin: Origin,
) -> None:
    """Make a page about a run and its best length.

    One HTML file that needs no network: what the run is, the metric against the length with its noise, how exact each
    length is, how the network moved, all trials, and the commands to repeat it.
    """
    from posthoc_cli.report import render

    page = values.new_file(out, "--out", (".html",), overwrite)
    assert page is not None
    run = values.open_run(directory, checkpoints, origin)
    folder = None if sweep is None else values.existing(sweep)
    files.write_whole(page, render(run, folder, page).encode(), overwrite)
    output.print_line(f"wrote {page}")
