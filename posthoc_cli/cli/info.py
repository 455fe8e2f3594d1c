"""`ema info`: what a directory or a file holds, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from posthoc_cli.cli import output
from posthoc_cli.cli.values import existing

_LONGEST_TEXT = 200

EPILOG = "Example:  ema info run/ema   or   ema info model.safetensors --json"


def info(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE", help="Snapshots, outputs, a model in shards or its index, or a single file."
        ),
    ],
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="All coefficients of an output, and its profile error.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a directory or a file holds.

    Reads headers only. Exit code 1 when something is wrong with a directory: mixed runs, damaged headers. Every byte
    is checked by ema verify.
    """
    from posthoc_cli.snapshots.description import describe

    report = describe(existing(path))
    if as_json:
        output.print_json(report)
    else:
        _print(report, verbose)
    if report.get("problems"):
        raise typer.Exit(1)


# --- as text ---------------------------------------------------------------------------------------


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
    for note in report.get("notes", ()):
        output.print_line(f"note: {note}")
    for problem in report.get("problems", ()):
        output.print_line(f"problem: {problem}")


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
    _print_rest(len(outputs) - len(shown))


def _print_coefficients(snapshots: list[dict[str, Any]], verbose: bool) -> None:
    """Those of the largest size, as they lie in the output."""
    order = sorted(range(len(snapshots)), key=lambda index: -abs(snapshots[index]["coefficient"]))
    shown = sorted(order[: len(order) if verbose else output.MOST_ROWS])
    rows = [[_cut(snapshots[index]["file"]), _coefficient(snapshots[index]["coefficient"])] for index in shown]
    output.print_table(["snapshot", "coefficient"], rows, left=["snapshot"])
    _print_rest(len(order) - len(shown), " with smaller coefficients")


def _print_rest(count: int, what: str = "") -> None:
    if count:
        output.print_line(f"and {count:,} more{what}; --verbose lists them")


def _range_text(ends: list[float] | None) -> str:
    if ends is None:
        return "unknown"
    low, high = map(output.percent, ends)
    return low if low == high else f"{low} to {high}"


def _text(key: str, value: Any) -> str:
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
    if key in ("sigma_rel", "gamma") and value is None:
        return ""  # of a profile that is no power function
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
    if isinstance(value, float):
        return f"{value:,.12g}"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if key == "path" else _cut(str(value))


def _coefficient(value: float) -> str:
    return f"{value:+.6f}" if abs(value) < 1e6 else f"{value:+.6g}"


def _cut(text: str) -> str:
    """A text from a file, of a length that fits a few lines."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 3]}..."


COMMAND = info
