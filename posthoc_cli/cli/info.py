"""`ema info`: what a directory or a file contains, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer import Argument

from posthoc_cli.cli import options, output
from posthoc_cli.report.facts import facts

EPILOG = "Example:  ema info run/ema   or   ema info model.safetensors --json"


def info(
    path: str = Argument(
        ..., metavar="DIR|FILE", help="Snapshots, outputs, checkpoints, a model in shards or its index, or one file."
    ),
    as_json: bool = options.JSON,
) -> None:
    """Show what a directory or a file contains.

    Reads headers only. Exit code 1 if a directory has a problem, such as mixed runs or damaged headers. ema verify
    checks every byte.
    """
    report = options.open_run(path, directory=False).info()
    output.show(report, as_json, _print)
    if report.get("problems"):
        raise typer.Exit(1)


def _print(report: dict[str, Any]) -> None:
    output.print_pairs(facts(report))
    if profiles := report.get("profiles"):
        rows = [
            one | {"count": len(one["times"]), "first": one["times"][0], "last": one["times"][-1]} for one in profiles
        ]
        times = ["snapshots:count", "first t:first", "last t:last", "rounding:relative_rounding_range"]
        output.print_line()
        output.print_rows(rows, ["sigma_rel", *times, "size:bytes"])
    if checkpoints := report.get("checkpoints"):
        output.print_some(checkpoints, ["checkpoint:file", "t", "holds", "size:bytes"])
    if outputs := report.get("outputs"):
        rows = [{"profile": one["kind"]} | one | {"name": Path(one["path"]).name} for one in outputs]
        output.print_some(rows, ["output:name", "profile", "t", "predicted_error", "size:bytes"])
    if report["kind"] == "output":
        output.print_line()
        output.print_coefficients(report["snapshots"])
    for kind in ("note", "problem"):
        for text in report.get(f"{kind}s", ()):
            output.print_line(f"{kind}: {text}")
