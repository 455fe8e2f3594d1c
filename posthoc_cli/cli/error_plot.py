"""`ema error-plot`: reconstruction error against sigma_rel, for directories or for schedules not yet run."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli import files
from posthoc_cli.cli import output
from posthoc_cli.cli.amounts import parse_count
from posthoc_cli.cli.values import (
    BetaOption,
    BetweenOption,
    MethodOption,
    ProfileOption,
    WindowOption,
    check_output,
    existing_directory,
    parse_sigma_range,
    parse_sigma_rels,
    parse_targets,
)
from posthoc_cli.errors import InvalidValueError, printable

if TYPE_CHECKING:
    from posthoc_cli.planning import ErrorCurve
    from posthoc_cli.synthesis.judging import Judged
    from posthoc_cli.targets import Target

EPILOG = (
    "Example:  ema error-plot run/ema --out error.png   or, before training,   "
    "ema error-plot --sigma-rels 0.05,0.28 --steps 100000 --checkpoint-every 1000 --max-checkpoints 20 --out plan.png"
)

PICTURES = (".png", ".svg", ".pdf")
_FORMULAS = (*"=+-@", *"＝＋－＠")  # the latter where a spreadsheet speaks Chinese or Japanese
MOST_ROWS = 24
"""Targets over time in one picture."""


def error_plot(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Directories that trackers wrote.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The picture: .png, .svg or .pdf.")] = None,
    sigma_rels: Annotated[
        list[str] | None,
        typer.Option(
            help="A schedule not yet run: tracked widths, such as 0.05,0.28. Give it again for another schedule."
        ),
    ] = None,
    steps: Annotated[
        list[str] | None, typer.Option(metavar="COUNT", help="Of the schedule: length of training, such as 100K.")
    ] = None,
    checkpoint_every: Annotated[
        list[str] | None, typer.Option(metavar="COUNT", help="Of the schedule: steps between snapshots.")
    ] = None,
    max_checkpoints: Annotated[
        list[str] | None,
        typer.Option(metavar="COUNT", help="Of the schedule: snapshots kept a profile. [default: all]"),
    ] = None,
    draw: Annotated[
        str | None,
        typer.Option(
            metavar="SIGMA_REL",
            help="Also draw these targets over training time, and their coefficients: 0.15 or a list.",
        ),
    ] = None,
    beta: BetaOption = None,
    window: WindowOption = None,
    between: BetweenOption = None,
    profile: ProfileOption = None,
    sigma_range: Annotated[str, typer.Option(help="The curve's range of sigma_rel: LOW:HIGH.")] = "0.01:0.2886",
    t: Annotated[float | None, typer.Option(help="Time of the targets. [default: the last snapshot's]")] = None,
    method: MethodOption = None,
    csv_out: Annotated[Path | None, typer.Option("--csv", help="Write the curves as a table too.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the curves as one JSON object.")] = False,
) -> None:
    """Draw how exact averages of any length will be.

    For directories after training, or for schedules before it.

    The curve is the predicted error: the expected relative L2 distance of the weights from the true average. Beside
    it stands the profile error, the relative L2 distance between the wanted profile and the one that the snapshots
    make. A schedule has only that. Tracked profiles are marked; the range below 1 % is shaded and named in the title.

    --beta, --window, --between and --profile add targets of other kinds: points at the targets' own width (standard
    deviation / t), and drawings over training time as by --draw.
    """
    from posthoc_cli.synthesis.judging import comparable

    if out is None and csv_out is None and not as_json:
        raise InvalidValueError("--out: name a picture (.png, .svg, .pdf), or ask for --csv or --json")
    out, csv_out = (None if path is None else files.expanded(path) for path in (out, csv_out))
    if out is not None and out.suffix not in PICTURES:
        raise InvalidValueError(f"--out {out}: must end in {', '.join(PICTURES)}")
    if out is not None and out == csv_out:
        raise InvalidValueError(f"--csv {csv_out}: is the picture's name too; take another")
    if csv_out is not None and csv_out.suffix != ".csv":
        raise InvalidValueError(f"--csv {csv_out}: must end in .csv")
    for path, option in ((out, "--out"), (csv_out, "--csv")):
        if path is not None:
            check_output(path, option, force)
    targets = parse_targets(draw, beta, window, between, profile, "--draw")
    ends = parse_sigma_range(sigma_range)
    judged = _judged(directories or [], t, sigma_rels or [], steps or [], checkpoint_every or [], max_checkpoints or [])
    rows = len(targets) * len(judged)
    if out is not None and rows > MOST_ROWS:
        raise InvalidValueError(f"--out {out}: {rows} drawings over training time; at most {MOST_ROWS} go into it")
    others = [target for target in targets if target.sigma_rel is None]
    curves = [each.curve(ends, others, t, method) for each in judged]
    if out is not None:
        _draw(out, comparable(curves), judged, targets, t, method, force)
    if csv_out is not None:
        _write_csv(csv_out, curves, force)
    if as_json:
        output.print_json({"curves": [_curve_json(curve) for curve in curves]})
    else:
        _print_summary(comparable(curves), [path for path in (out, csv_out) if path is not None])


def _judged(
    directories: list[Path],
    t: float | None,
    sigma_rels: list[str],
    steps: list[str],
    every: list[str],
    most: list[str],
) -> list[Judged]:
    """What to draw: a run for each directory, as of `t`, and a schedule for each --sigma-rels."""
    from posthoc_cli.planning import Schedule
    from posthoc_cli.synthesis.judging import Judged

    if not sigma_rels and (steps or every or most):
        raise InvalidValueError("--sigma-rels: is missing; --steps and the like describe a schedule of tracked widths")
    for directory in directories:
        existing_directory(directory)
    judged = [Judged.of_directory(directory, t) for directory in directories]
    for index, widths in enumerate(sigma_rels):
        schedule = Schedule(
            tuple(parse_sigma_rels(widths, "--sigma-rels")),
            _nth(steps, index, len(sigma_rels), "--steps"),
            _nth(every, index, len(sigma_rels), "--checkpoint-every"),
            _nth(most, index, len(sigma_rels), "--max-checkpoints") if most else None,
        )
        judged.append(Judged.of_schedule(schedule))
    if not judged:
        raise InvalidValueError(
            "name a directory of snapshots, or a schedule: --sigma-rels, --steps, --checkpoint-every"
        )
    return judged


def _nth(values: list[str], index: int, schedules: int, option: str) -> int:
    """The value for one schedule: one for all, or one each."""
    if not values:
        raise InvalidValueError(f"{option}: is missing; a schedule needs it")
    if len(values) not in (1, schedules):
        raise InvalidValueError(
            f"{option}: give it once, or once for each --sigma-rels ({schedules}); it came {len(values)} times"
        )
    return parse_count(values[0] if len(values) == 1 else values[index], option)


def _draw(
    out: Path,
    curves: list[ErrorCurve],
    judged: list[Judged],
    targets: list[Target],
    t: float | None,
    method: str | None,
    force: bool,
) -> None:
    from posthoc_cli import plots

    fits = [each.fit(target, t, method) for target in targets for each in judged]
    files.write_whole(out, plots.as_file(lambda: plots.error_figure(curves, fits), out.suffix), force)


def _write_csv(path: Path, curves: list[ErrorCurve], force: bool) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["curve", "t", "target", "sigma_rel", "predicted_error", "profile_error"])
    for curve in curves:
        for target, *numbers in _points(curve):
            cells = ["" if number is None else repr(number) for number in numbers]
            writer.writerow([_harmless(curve.label), repr(curve.t), _harmless(target), *cells])
    files.write_whole(path, text.getvalue().encode(), force)


def _points(curve: ErrorCurve) -> list[tuple[str, float, float | None, float]]:
    """Target, its width, predicted error and profile error: of the curve, then of the targets of other kinds."""
    count = len(curve.sigma_rels)
    predicted = _predicted(curve) or [None] * count
    along = zip(["sigma_rel"] * count, curve.sigma_rels.tolist(), predicted, curve.profile_error.tolist(), strict=True)
    others = [
        (other.label, other.sigma_rel, output.finite(other.predicted_error), other.profile_error)
        for other in curve.others
    ]
    return [*along, *others]


def _predicted(curve: ErrorCurve) -> list[float | None] | None:
    """The predicted errors; None where there is none, of the curve or of a point."""
    if curve.predicted_error is None:
        return None
    return [output.finite(error) for error in curve.predicted_error.tolist()]


def _harmless(text: str) -> str:
    """A cell that a spreadsheet will not take for a formula; what is no text (tabs, line ends) is escaped."""
    return f"'{printable(text)}" if text.lstrip()[:1] in _FORMULAS else printable(text)


def _curve_json(curve: ErrorCurve) -> dict[str, Any]:
    predicted = _predicted(curve)
    return {
        "label": curve.label,
        "t": curve.t,
        "tracked": list(curve.tracked),
        "error": "profile_error" if predicted is None else "predicted_error",
        "below_1_percent": [list(ends) for ends in curve.ranges_below(0.01)],
        "sigma_rel": curve.sigma_rels.tolist(),
        "predicted_error": predicted,
        "profile_error": curve.profile_error.tolist(),
        "others": [
            {
                "target": other.label,
                "sigma_rel": other.sigma_rel,
                "predicted_error": output.finite(other.predicted_error),
                "profile_error": other.profile_error,
            }
            for other in curve.others
        ],
    }


def _print_summary(curves: list[ErrorCurve], written: list[Path]) -> None:
    error = "profile error" if curves[0].predicted_error is None else "predicted error"
    rows = []
    for curve in curves:
        good = ", ".join(f"{low:.3f} to {high:.3f}" for low, high in curve.ranges_below(0.01)) or "none"
        rows.append([curve.label, ", ".join(f"{s:g}" for s in curve.tracked), good])
    output.print_table(["snapshots", "tracked", f"sigma_rel with {error} below 1 %"], rows, left=["snapshots"])
    rows = [
        [
            other.label,
            f"{other.sigma_rel:.3g}",
            output.percent(other.predicted_error),
            output.percent(other.profile_error),
            curve.label,
        ]
        for curve in curves
        for other in curve.others
    ]
    if rows:
        output.print_line("")
        columns = ["target", "width", "predicted error", "profile error", "snapshots"]
        output.print_table(columns, rows, left=["target", "snapshots"])
    output.print_line(f"wrote {', '.join(map(str, written))}")


COMMAND = error_plot
