"""`ema error-plot`: reconstruction error against sigma_rel, for directories or for planned schedules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Argument

from posthoc_cli import files
from posthoc_cli.cli import output, values
from posthoc_cli.errors import InvalidValueError, percent
from posthoc_cli.targets import parse_numbers

if TYPE_CHECKING:
    from posthoc_cli.planning import ErrorReport, Schedule

EPILOG = (
    "Example:  ema error-plot run/ema --out error.png   or   "
    "ema error-plot --sigma-rels 0.05,0.28 --steps 100000 --checkpoint-every 1000 --max-checkpoints 20 --out plan.png"
)


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
        help="Also draw these averages over training time, with coefficients: a sigma_rel such as 0.15, or another "
        "kind such as window:1000, which is also a point of the curve (see `ema help targets`). Repeatable.",
    ),
    sigma_range: str = values.TARGETS("0.01:0.2886", metavar="LOW:HIGH", help="The curve's range of sigma_rel."),
    checkpoints: str | None = values.CHECKPOINTS,
    t: float | None = values.TIME,
    method: str | None = values.METHOD,
    sigma_rels: list[str] = values.SCHEDULE(
        [], help="Tracked widths, such as 0.05,0.28. Repeat the option for another schedule."
    ),
    steps: list[str] = values.SCHEDULE([], metavar="COUNT", help="Length of training, such as 100K."),
    checkpoint_every: list[str] = values.SCHEDULE([], metavar="COUNT", help="Steps between snapshots."),
    max_checkpoints: list[str] = values.SCHEDULE([], metavar="COUNT", show_default="all", help="Snapshots per width."),
    dtype: str = values.SCHEDULE("float16", autocompletion=values.STORED, help="float16, bfloat16 or float32."),
    like: Path | None = values.LIKE,
) -> None:
    """Draw how exact averages of any length will be.

    Takes directories after training, or schedules before it.

    The curve is the predicted error: the expected relative L2 distance of the weights from the true average. For a
    schedule the network is assumed to move evenly, or as in the run that --like names, as in ema plan. Tracked
    profiles are marked; the range below 1 % is shaded and named in the title. --method paper adds the profile error,
    the published measure: the relative L2 distance between the target profile and the reconstructed one.
    """
    from posthoc_cli.run import error_report

    if out is None and not as_json:
        raise InvalidValueError("--out", "name a picture (.png, .svg, .pdf) or a table (.csv), or add --json")
    targets = values.parse_targets(None, target)
    ends = values.parse_sigma_range(sigma_range)
    if not sigma_rels and (steps or checkpoint_every or max_checkpoints or like):
        raise InvalidValueError("--sigma-rels", "is missing; the other options of a schedule need it")
    schedules = _schedules(sigma_rels, steps, checkpoint_every, max_checkpoints)
    runs = values.open_runs(directories, checkpoints) if directories or checkpoints is not None else []
    if not runs and not schedules:
        what = "name a directory of snapshots, or a schedule"
        raise InvalidValueError(what, "--sigma-rels, --steps, --checkpoint-every")
    earlier = None if like is None else values.open_run(like)
    report = error_report(
        runs, schedules, ends, t=t, method=method, dtype=values.STORED_DTYPES.get(dtype, dtype), like=earlier,
        draw=targets, out=out, overwrite=overwrite,
    )  # fmt: skip
    output.print_report(report, as_json, _print, 2 if method == "paper" else 1, out)


def _schedules(sigma_rels: list[str], steps: list[str], every: list[str], most: list[str]) -> list[Schedule]:
    """Return the schedules that the options describe, one for each value of --sigma-rels."""
    from posthoc_cli.planning import Schedule

    count = len(sigma_rels)
    lengths, intervals = _counts(steps, "--steps", count), _counts(every, "--checkpoint-every", count)
    kept: Sequence[int | None] = _counts(most, "--max-checkpoints", count) if most else [None] * count
    widths = [tuple(parse_numbers(text, "--sigma-rels")) for text in sigma_rels]
    return [Schedule(*settings) for settings in zip(widths, lengths, intervals, kept, strict=True)]


def _counts(texts: list[str], option: str, schedules: int) -> list[int]:
    """Return the option's value for each schedule: the same for all, or one value per schedule."""
    if len(texts) not in (1, schedules):
        given = f"was given {len(texts)} times" if texts else "is missing"
        raise InvalidValueError(option, f"{given}; give it once, or once for each --sigma-rels")
    return [values.parse_count(texts[index % len(texts)], option) for index in range(schedules)]


def _print(report: ErrorReport, shown: int, out: Path | None) -> None:
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
    if out is not None:
        output.print_line(f"wrote {files.expanded(out)}")
