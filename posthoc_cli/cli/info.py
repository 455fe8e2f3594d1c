"""`ema info`: what a directory or a file holds, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from posthoc_cli.cli import output, values
from posthoc_cli.cli.values import existing

EPILOG = "Example:  ema info run/ema   or   ema info model.safetensors --json"
_LONGEST_TEXT = 200


def info(
    path: Path = typer.Argument(
        ..., metavar="DIR|FILE", help="Snapshots, outputs, a model in shards or its index, or a single file."
    ),
    verbose: bool = typer.Option(
        False, "--verbose", "-v", help="All coefficients of an output, and its profile error."
    ),
    as_json: bool = values.JSON,
) -> None:
    """Show what a directory or a file holds.

    Reads headers only. Exit code 1 if something is wrong with a directory: mixed runs, damaged headers. ema verify
    checks every byte.
    """
    from posthoc_cli.snapshots.description import describe

    report = describe(existing(path))
    output.print_json(report) if as_json else _print(report, verbose)
    if report.get("problems"):
        raise typer.Exit(1)


def _print(report: dict[str, Any], verbose: bool) -> None:
    hidden = {"notes", "problems", "profiles", "outputs"}
    hidden |= set() if verbose or report.get("method") == "paper" else {"profile_error"}
    pairs = [(key.replace("_", " "), _text(key, value)) for key, value in report.items() if key not in hidden]
    output.print_pairs([(name, text) for name, text in pairs if text])
    if "profiles" in report:
        output.print_line("")
        _print_profiles(report["profiles"])
    if "outputs" in report:
        output.print_line("")
        _print_outputs(report["outputs"], verbose)
    if report["kind"] == "output":
        output.print_line("")
        _print_coefficients(report["snapshots"], verbose)
    for kind in ("note", "problem"):
        for text in report.get(f"{kind}s", ()):
            output.print_line(f"{kind}: {text}")


def _print_profiles(profiles: list[dict[str, Any]]) -> None:
    columns = ["sigma_rel", "gamma", "snapshots", "first t", "last t", "rounding", "size"]
    rows = [
        [
            f"{p['sigma_rel']:g}",
            f"{p['gamma']:.4g}",
            str(len(p["times"])),
            f"{p['times'][0]:,.12g}",
            f"{p['times'][-1]:,.12g}",
            _range_text(p["relative_rounding"]),
            output.size_text(p["bytes"]),
        ]
        for p in profiles
    ]
    output.print_table(columns, rows)


def _range_text(ends: list[float] | None) -> str:
    if ends is None:
        return "unknown"
    low, high = map(output.percent, ends)
    return low if low == high else f"{low} to {high}"


def _print_outputs(outputs: list[dict[str, Any]], verbose: bool) -> None:
    shown = outputs if verbose else outputs[: output.MOST_ROWS]
    rows = [
        [
            Path(report["path"]).name,
            _cut(report.get("profile", report["kind"])),
            f"{report['t']:,.12g}" if "t" in report else "",
            output.percent(report["predicted_error"]) if "predicted_error" in report else "",
            output.size_text(report["bytes"]),
        ]
        for report in shown
    ]
    output.print_table(["output", "profile", "t", "predicted error", "size"], rows, left=["output", "profile"])
    output.print_rest(len(outputs) - len(shown))


def _print_coefficients(snapshots: list[dict[str, Any]], verbose: bool) -> None:
    """The largest ones, in the order of the output."""
    shown = output.largest([item["coefficient"] for item in snapshots], verbose)
    rows = [[_cut(snapshots[i]["file"]), _coefficient(snapshots[i]["coefficient"])] for i in shown]
    output.print_table(["snapshot", "coefficient"], rows, left=["snapshot"])
    output.print_rest(len(snapshots) - len(shown), "with smaller coefficients")


def _coefficient(value: float) -> str:
    return f"{value:+.6f}" if abs(value) < 1e6 else f"{value:+.6g}"


def _text(key: str, value: Any) -> str:
    """A value of a report for people; empty to leave it out."""
    if key == "bytes":
        return output.size_text(value)
    if key == "measured":
        return f"{value:,} of them" if value else "none of them: errors are predicted from a sample"
    if key == "snapshots" and isinstance(value, list):
        return f"{len(value):,}"
    if key in ("profile_error", "predicted_error", "relative_rounding"):
        return output.percent(value)
    if key == "norm":
        return f"{value:.4g}"
    if value is None:
        return "" if key in ("sigma_rel", "gamma") else "none"  # of a profile that is no power function
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.12g}"
    return str(value) if key == "path" else _cut(str(value))


def _cut(text: str) -> str:
    """A text from a file, cut to a few lines."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 3]}..."
