"""`ema report`: make a page about a run and its best length."""

from __future__ import annotations

from pathlib import Path

from typer import Argument

from posthoc_cli import files
from posthoc_cli.cli import options, output


def report(
    directories: list[str] = Argument(
        ..., metavar="DIR", help="A directory of snapshots or of checkpoints; several are compared."
    ),
    sweep: list[Path] = options.RUN(
        [], metavar="DIR", help="The folder that ema sweep has written for such a run. Repeatable."
    ),
    out: str = options.OUTPUT("report.html", "--out", "-o", help="The page."),
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
) -> None:
    """Make a page about a run and its best length.

    Writes one HTML file that needs no network: what the run is, the metric against the length with
    its noise, how exact each length is, all trials, and the commands to repeat them. Several runs
    or sweeps are compared.
    """
    from posthoc_cli.report.page import render

    page = files.new_file(out, (".html",), overwrite)
    runs = list(map(options.open_run, directories))
    folders = [files.expanded(folder) for folder in sweep]
    # a name that is not valid text holds lone surrogates
    text = render(runs, folders, page).encode(errors="backslashreplace")
    files.write_atomically(page, text, overwrite)
    output.show({"output": str(page), "bytes": len(text)}, as_json, lambda _: None, page)
