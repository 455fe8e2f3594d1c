"""`ema info`: what a directory or a file holds, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer import Argument

from posthoc_cli import resources
from posthoc_cli.cli import output, values

EPILOG = "Example:  ema info run/ema   or   ema info model.safetensors --json"
_LONGEST_TEXT = 200


def info(
    path: Path = Argument(
        ..., metavar="DIR|FILE", help="Snapshots, outputs, checkpoints, a model in shards or its index, or one file."
    ),
    as_json: bool = values.JSON,
) -> None:
    """Show what a directory or a file holds.

    Reads headers only. Exit code 1 if something is wrong with a directory: mixed runs, damaged headers. ema verify
    checks every byte.
    """
    report = values.open_run(path, directory=False).info()
    output.print_report(report, as_json, _print)
    if report.get("problems"):
        raise typer.Exit(1)


def _print(report: dict[str, Any]) -> None:
    hidden = {"notes", "problems", "profiles", "outputs", "checkpoints"}
    hidden |= set() if report.get("method") == "paper" else {"profile_error"}
    names = {key: key.replace("_", " ").replace("sigma rel", "sigma_rel") for key in report}
    pairs = [(names[key], _text(key, value)) for key, value in report.items() if key not in hidden]
    output.print_pairs([(name, text) for name, text in pairs if text])
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
        rounding = " to ".join(dict.fromkeys(map(output.percent, ends or [None])))
        span = f"{times[0]:,.12g}", f"{times[-1]:,.12g}"
        rows.append([*numbers, *span, rounding, resources.size_text(profile["bytes"])])
    output.print_line()
    columns = ["sigma_rel", "snapshots", "first t", "last t", "rounding", "size"]
    output.print_table(columns, rows, left=["rounding"])


def _print_outputs(outputs: list[dict[str, Any]]) -> None:
    shown = outputs[: output.MOST_ROWS]
    rows = []
    for report in shown:
        profile = _cut(report.get("profile", report["kind"]))
        t = f"{report['t']:,.12g}" if "t" in report else ""
        error = output.percent(report["predicted_error"]) if "predicted_error" in report else ""
        rows.append([Path(report["path"]).name, profile, t, error, resources.size_text(report["bytes"])])
    output.print_line()
    output.print_table(["output", "profile", "t", "predicted error", "size"], rows, left=["output", "profile"])
    output.print_rest(len(outputs) - len(shown))


def _print_checkpoints(checkpoints: list[dict[str, Any]]) -> None:
    """All, or the first and the last ones."""
    shown = checkpoints if len(checkpoints) <= output.MOST_ROWS else [*checkpoints[:5], *checkpoints[-5:]]
    rows = [[_cut(one["file"]), f"{one['t']:,.12g}", one["holds"], resources.size_text(one["bytes"])] for one in shown]
    output.print_line()
    output.print_table(["checkpoint", "t", "holds", "size"], rows, left=["checkpoint", "holds"])
    output.print_rest(len(checkpoints) - len(shown))


def _print_coefficients(snapshots: list[dict[str, Any]]) -> None:
    values = [one["coefficient"] for one in snapshots]
    texts = [f"{value:+.6f}" if abs(value) < 1e6 else f"{value:+.6g}" for value in values]
    rows = [[_cut(one["file"]), text] for one, text in zip(snapshots, texts, strict=True)]
    output.print_line()
    output.print_largest(["snapshot", "coefficient"], rows, values)


_FORMATS: dict[str, Callable[[Any], str]] = {
    "path": str,
    "bytes": resources.size_text,
    "norm": "{:.4g}".format,
    "measured": lambda count: f"{count:,} of them" if count else "none of them: errors are predicted from a sample",
    **dict.fromkeys(("profile_error", "predicted_error", "relative_rounding"), output.percent),
}


def _text(key: str, value: Any) -> str:
    """A value of a report for people; empty to leave it out."""
    if key in _FORMATS:
        return _FORMATS[key](value)
    if key == "snapshots" and isinstance(value, list):
        return f"{len({one['file'] for one in value}):,}"  # that of groups of tensors lists them once a group
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
    return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 3]}..."
