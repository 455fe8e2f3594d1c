"""`ema error-plot`: reconstruction error against sigma_rel."""

from __future__ import annotations

from pathlib import Path

from typer import Argument

from posthoc_cli import files
from posthoc_cli.cli import output, values
from posthoc_cli.errors import InvalidValueError, percent
from posthoc_cli.planning import ErrorReport

EPILOG = "Example:  ema error-plot run/ema --out error.png"


def error_plot(
    directories: list[Path] = Argument(
        [], metavar="DIR", help="Directories of snapshots or of checkpoints, or globs of checkpoints."
    ),
    out: Path | None = values.OUTPUT(
        None, "--out", "-o", metavar="FILE", help="The picture: .png, .svg or .pdf; or the curves as a table: .csv."
    ),
    overwrite: bool = values.OVERWRITE,
    as_json: bool = values.JSON,
    target: list[str] = values.TARGETS(
        [],
        metavar="TARGET",
        help="Also these averages, as points: window:1000, or another kind (see `ema guide synthesis`). Repeatable.",
    ),
    sigma_range: str = values.TARGETS("0.01:0.2886", metavar="LOW:HIGH", help="The curve's range of sigma_rel."),
    checkpoints: str | None = values.CHECKPOINTS,
    t: float | None = values.TIME,
    method: values.Method | None = values.METHOD,
) -> None:
    """Draw how exact averages of any length will be.

    The curve is the predicted error: the expected relative L2 distance of the weights from the true average. Tracked
    profiles are marked; the range below 1 % is shaded and named in the title. --method paper adds the profile error,
    the published measure: the relative L2 distance between the target profile and the reconstructed one.

    ema plan draws the same curve before a training.
    """
    from posthoc_cli import plots

    if out is None and not as_json:
        raise InvalidValueError("--out", "name a picture (.png, .svg, .pdf) or a table (.csv), or add --json")
    path = None if out is None else files.new_file(out, (*plots.PICTURES, ".csv"), overwrite)
    targets, ends = values.parse_targets(None, target), values.parse_sigma_range(sigma_range)
    runs = values.open_runs(directories, checkpoints)
    report = ErrorReport(tuple(run.error_curve(ends, t=t, method=method, others=targets) for run in runs))
    if path is not None and path.suffix == ".csv":
        files.write_atomically(path, report.to_csv().encode(), overwrite)
    elif path is not None:
        output.write_picture(lambda: plots.error_figure(report.curves, method == "paper"), path, overwrite)
    output.print_report(report, as_json, _print, 2 if method == "paper" else 1, path)


def _print(report: ErrorReport, shown: int, path: Path | None) -> None:
    """Print a summary of each curve, and of each other target the first `shown` of its two errors."""
    for curve in report.curves:
        output.print_line(curve.label)
        tracked = ", ".join(f"{s:g}" for s in curve.tracked) or "none"
        below = curve.ranges_text(0.01) or "none"
        output.print_pairs([("  tracked", tracked), ("  predicted error below 1 %", f"sigma_rel {below}")])
        columns = ["  target", "width", *["predicted error", "profile error"][:shown]]
        rows = []
        for other in curve.others:
            errors = map(percent, [other.predicted_error, other.profile_error][:shown])
            rows.append([f"  {other.label}", f"{other.sigma_rel:.3g}", *errors])
        if rows:
            output.print_table(columns, rows, left=["  target"])
    if path is not None:
        output.print_line(f"wrote {path}")
