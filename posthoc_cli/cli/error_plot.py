"""`ema error-plot`: draw how exact averages of any length will be."""

from __future__ import annotations

from collections.abc import Sequence

from typer import Argument

from posthoc_cli.cli import options, output
from posthoc_cli.cli.quotes import refuse_split
from posthoc_cli.errors import InvalidValueError, argument
from posthoc_cli.planning import CurveRequest, ErrorCurve, Schedule, format_widths
from posthoc_cli.snapshots.sources import announce, announce_doubts


def error_plot(
    directories: list[str] = Argument(
        None,
        metavar="DIR",
        help="Directories of snapshots or of checkpoints, or globs of checkpoints.",
    ),
    out: str | None = options.PICTURE,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
    decay: list[str] = options.DECAY,
    target: list[str] = options.TARGETS(
        [], metavar="TARGET", help="Also this average: window:1000. Repeatable."
    ),
    sigma_range: str = options.TARGETS(
        "0.01:0.2886", metavar="LOW:HIGH", help="The curve's range of sigma_rel."
    ),
    t: str | None = options.TIME,
    method: options.Method | None = options.METHOD,
    steps: str | None = options.SCHEDULE(
        None, metavar="COUNT", help="Steps of a training to come, in place of DIR: 400000, 400K."
    ),
    every: str | None = options.SCHEDULE(
        None,
        metavar="COUNT",
        show_default="1000",
        help="Steps between two snapshots, checkpoint_every.",
    ),
    keep: str | None = options.SCHEDULE(
        None,
        metavar="COUNT",
        show_default="20",
        help="Times whose snapshots are kept, max_checkpoints.",
    ),
) -> None:
    """Draw how exact averages of any length will be.

    The curve is the predicted error: the expected relative L2 distance of the weights from the true
    average. The dashed line is the lost gain: an upper estimate of how much of averaging's benefit
    this error costs (`ema guide exactness`). The range below 5 % is shaded and named in the title.
    Tracked profiles are marked. --method paper adds the profile error, the published measure: the
    relative L2 distance between the target profile and the reconstructed one.

    With --steps it is the curve of a training to come, with the default profiles and float16
    snapshots, if the network moves evenly: as a random walk that covers a quarter of the norm of
    its weights.
    """
    from posthoc_cli import plots
    from posthoc_cli.synthesis.curve import run_curve

    picture = options.new_picture(out, overwrite)
    request = CurveRequest(
        options.parse_sigma_range(sigma_range),
        t=options.optional(options.parse_number, t, "--t"),
        method=method,
        others=options.parse_targets([], decay, target),
    )
    if bool(directories) == (steps is not None):
        raise InvalidValueError("DIR", "name a directory, or give --steps of a training to come")
    curves = list[ErrorCurve]()
    findings = list[str]()
    if steps is not None:
        schedule = Schedule(
            options.parse_count(steps, "--steps"),
            options.parse_count(every or "1000", "--every"),
            options.parse_count(keep or "20", "--keep"),
        )
        curves.append(schedule.error_curve(request))
    else:
        refuse_split(directories)
        for name, value in {"every": every, "keep": keep}.items():
            if value is not None:
                reason = f"is of a training to come: give {argument('steps')} in place of DIR"
                raise InvalidValueError(name, reason, value=value)
        for sources in [options.open_run(directory).sources for directory in directories]:
            announce(sources)
            findings += sources.findings
            curves.append(run_curve(sources, request))
            announce_doubts(sources)
    if picture is not None:
        output.write_picture(
            lambda: plots.error_figure(curves, method == "paper"), picture, overwrite
        )
    report = {"curves": [curve.to_dict() for curve in curves], "findings": findings}
    output.show(report, as_json, lambda _: _print_curves(curves, method == "paper"), picture)
    if picture is None and not as_json:
        output.print_note("note: --out errors.png draws the curve")


def _print_curves(curves: Sequence[ErrorCurve], is_paper: bool) -> None:
    columns = ["  target:target", "width", "predicted_error", "lost gain at most:lost_gain"]
    if is_paper:
        columns.append("profile_error")
    for curve in curves:
        output.print_line(curve.label)
        pairs = [("  lost gain", curve.good_range)]
        if curve.tracked:
            pairs.append(("  tracked", format_widths(curve.tracked)))
        output.print_pairs(pairs)
        rows = curve.to_dict()["others"]
        for row in rows:
            row["target"] = f"  {row['target']}"
            row["width"] = f"{row['sigma_rel']:.3g}"
        if rows:
            output.print_rows(rows, columns)
