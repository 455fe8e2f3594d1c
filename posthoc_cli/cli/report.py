"""`ema report`: a page about a run and a sweep."""

from __future__ import annotations

from pathlib import Path

from typer import Option

from posthoc_cli import files
from posthoc_cli.cli import output, values

EPILOG = "Example:  ema report run/ema --sweep sweep --out report.html"


def report(
    directory: Path = values.DIRECTORY,
    sweep: Path | None = Option(None, metavar="DIR", help="The folder of a sweep of this run, as ema sweep wrote it."),
    out: Path = Option("report.html", "--out", "-o", help="The page."),
    overwrite: bool = values.FORCE,
) -> None:
    """Make a page about a run and its best length.

    One HTML file that needs no network: what the run is, the metric against the length with its noise, how exact each
    length is, how the network moved, all trials, and the commands to repeat it.
    """
    from posthoc_cli.report import render
    from posthoc_cli.run import Run

    page = values.new_file(out, "--out", (".html",), overwrite)
    assert page is not None
    run = Run(values.existing(directory, directory=True))
    folder = None if sweep is None else values.existing(sweep)
    files.write_whole(page, render(run, folder, page).encode(), overwrite)
    output.print_line(f"wrote {page}")
