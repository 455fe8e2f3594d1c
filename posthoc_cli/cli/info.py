"""`ema info`: show what a directory or a file contains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer import Argument

from posthoc_cli.cli import options, output
from posthoc_cli.report.facts import facts


def info(
    path: str = Argument(
        ...,
        metavar="DIR|FILE",
        help="Snapshots, outputs, checkpoints, a model in shards or its index, or one file.",
    ),
    as_json: bool = options.JSON,
) -> int:
    """Show what a directory or a file contains.

    Reads headers only, and from averages in checkpoints what shows their decay. Exit code 1 if a
    directory has a problem, such as mixed runs or damaged headers. ema verify checks every byte.
    """
    report = options.open_run(path, directory=False).info()
    output.show(report, as_json, _print_info)
    return int(bool(report.get("problems")))


def _print_info(report: dict[str, Any]) -> None:
    output.print_pairs(facts(report))
    if profiles := report.get("profiles"):
        rows = []
        for profile in profiles:
            times = profile["times"]
            ends = {"count": len(times), "first": times[0], "last": times[-1]}
            rows.append(profile | ends)
        columns = [
            "sigma_rel",
            "as",
            "snapshots:count",
            "first t:first",
            "last t:last",
            "rounding:relative_rounding_range",
            "size:bytes",
        ]
        output.print_line()
        output.print_rows(rows, columns)
    if checkpoints := report.get("checkpoints"):
        columns = ["file", "t", "holds", "size:bytes"]
        if any(row.get("as") for row in checkpoints):
            columns.insert(3, "as")
        output.print_some(checkpoints, columns)
    if outputs := report.get("outputs"):
        rows = []
        for row in outputs:
            name = Path(row["path"]).name
            rows.append({"profile": row["kind"]} | row | {"name": name})
        output.print_some(rows, ["output:name", "profile", "t", "predicted_error", "size:bytes"])
    if report["kind"] == "output":
        output.print_line()
        output.print_coefficients(report["snapshots"])
    for kind in ("note", "problem"):
        for text in report.get(f"{kind}s", ()):
            output.print_line(f"{kind}: {text}")
