"""`ema info`: what a directory or a file contains, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer import Argument

from posthoc_cli import resources
from posthoc_cli.cli import output, values
from posthoc_cli.errors import percent
from posthoc_cli.report.facts import brief_text, facts

EPILOG = "Example:  ema info run/ema   or   ema info model.safetensors --json"


def info(
    path: Path = Argument(
        ..., metavar="DIR|FILE", help="Snapshots, outputs, checkpoints, a model in shards or its index, or one file."
    ),
    as_json: bool = values.JSON,
) -> None:
    """Show what a directory or a file contains.

    Reads headers only. Exit code 1 if a directory has a problem, such as mixed runs or damaged headers. ema verify
    checks every byte.
    """
    report = values.open_run(path, directory=False).info()
    output.print_report(report, as_json, _print)
    if report.get("problems"):
        raise typer.Exit(1)


def _print(report: dict[str, Any]) -> None:
    output.print_pairs(facts(report))
    if "profiles" in report:
        _print_profiles(report["profiles"])
    if "checkpoints" in report:
        _print_checkpoints(report["checkpoints"])
    if "outputs" in report:
        _print_outputs(report["outputs"])
    if report["kind"] == "output":
        _print_coefficients(report["snapshots"])
    for kind in ("note", "problem"):
        for text in report.get(f"{kind}s", ()):
            output.print_line(f"{kind}: {text}")


def _print_profiles(profiles: list[dict[str, Any]]) -> None:
    rows = []
    for profile in profiles:
        times, ends = profile["times"], profile["relative_rounding_range"]
        numbers = f"{profile['sigma_rel']:g}", str(len(times))
        rounding = " to ".join(dict.fromkeys(map(percent, ends or [None])))
        span = f"{times[0]:,.12g}", f"{times[-1]:,.12g}"
        rows.append([*numbers, *span, rounding, resources.size_text(profile["bytes"])])
    output.print_line()
    columns = ["sigma_rel", "snapshots", "first t", "last t", "rounding", "size"]
    output.print_table(columns, rows, left=["rounding"])


def _print_outputs(outputs: list[dict[str, Any]]) -> None:
    shown = outputs[: output.MOST_ROWS]
    rows = []
    for report in shown:
        profile = brief_text(report.get("profile", report["kind"]))
        t = f"{report['t']:,.12g}" if "t" in report else ""
        error = percent(report["predicted_error"]) if "predicted_error" in report else ""
        rows.append([Path(report["path"]).name, profile, t, error, resources.size_text(report["bytes"])])
    output.print_line()
    output.print_table(["output", "profile", "t", "predicted error", "size"], rows, left=["output", "profile"])
    output.print_rest(len(outputs) - len(shown))


def _print_checkpoints(checkpoints: list[dict[str, Any]]) -> None:
    """Print a table of all checkpoints, or of the first and the last five."""
    shown = checkpoints if len(checkpoints) <= output.MOST_ROWS else [*checkpoints[:5], *checkpoints[-5:]]
    rows = []
    for file in shown:
        rows.append([brief_text(file["file"]), f"{file['t']:,.12g}", file["holds"], resources.size_text(file["bytes"])])
    output.print_line()
    output.print_table(["checkpoint", "t", "holds", "size"], rows, left=["checkpoint", "holds"])
    output.print_rest(len(checkpoints) - len(shown))


def _print_coefficients(snapshots: list[dict[str, Any]]) -> None:
    coefficients = [snapshot["coefficient"] for snapshot in snapshots]
    texts = [f"{value:+.6f}" if abs(value) < 1e6 else f"{value:+.6g}" for value in coefficients]
    rows = [[brief_text(snapshot["file"]), text] for snapshot, text in zip(snapshots, texts, strict=True)]
    output.print_line()
    output.print_largest(["snapshot", "coefficient"], rows, coefficients)
