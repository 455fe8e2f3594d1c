"""`ema error-plot`: reconstruction error against sigma_rel."""

from __future__ import annotations

from pathlib import Path

from typer import Argument

from posthoc_cli import files
from posthoc_cli.cli import options, output
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning import ErrorCurve, ErrorReport

EPILOG = "Example:  ema error-plot run/ema --out error.png"


def error_plot(
    directories: list[str] = Argument(
        [], metavar="DIR", help="Directories of snapshots or of checkpoints, or globs of checkpoints."
    ),
    out: Path | None = options.OUTPUT(
        None, "--out", "-o", metavar="FILE", help="The picture: .png, .svg or .pdf; or the curves as a table: .csv."
    ),
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
    target: list[str] = options.TARGETS(
        [],
        metavar="TARGET",
        help="Also these averages, as points: window:1000, or another kind (see `ema guide synthesis`). Repeatable.",
    ),
    sigma_range: str = options.TARGETS("0.01:0.2886", metavar="LOW:HIGH", help="The curve's range of sigma_rel."),
    checkpoints: str | None = options.CHECKPOINTS,
    t: float | None = options.TIME,
    method: options.Method | None = options.METHOD,
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
    targets, ends = options.parse_targets(None, target), options.parse_sigma_range(sigma_range)
    runs = options.open_runs(directories, checkpoints)
    report = ErrorReport(tuple(run.error_curve(ends, t=t, method=method, others=targets) for run in runs))
    if path is not None and path.suffix == ".csv":
        files.write_atomically(path, report.to_csv().encode(), overwrite)
    elif path is not None:
        output.write_picture(lambda: plots.error_figure(report.curves, method == "paper"), path, overwrite)
    if as_json:
        output.print_json(report.to_dict())
        return
    for curve in report.curves:
        _print(curve, method == "paper")
    if path is not None:
        output.print_line(f"wrote {path}")


def _print(curve: ErrorCurve, is_paper: bool) -> None:
    """Print a summary of a curve."""
    tracked = ", ".join(f"{s:g}" for s in curve.tracked) or "none"
    below = curve.ranges_text(0.01) or "none"
    output.print_line(curve.label)
    output.print_pairs([("  tracked", tracked), ("  predicted error below 1 %", f"sigma_rel {below}")])
    rows = [
        other | {"target": f"  {other['target']}", "width": f"{other['sigma_rel']:.3g}"}
        for other in curve.to_dict()["others"]
    ]
    if rows:
        columns = ["  target:target", "width", "predicted_error", *["profile_error"] * is_paper]
        output.print_rows(rows, columns)
