"""`ema error-plot`: reconstruction error against sigma_rel, for directories or for schedules not yet run."""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli import files
from posthoc_cli.cli import output
from posthoc_cli.cli.output import DTYPES, LikeOption, assumption_text, read_likeness
from posthoc_cli.cli.values import (
    BetaOption,
    BetweenOption,
    MethodOption,
    ProfileOption,
    WindowOption,
    check_output,
    existing_directory,
    one_of,
    parse_count,
    parse_sigma_range,
    parse_sigma_rels,
    parse_targets,
)
from posthoc_cli.errors import InvalidValueError, printable

if TYPE_CHECKING:
    from posthoc_cli.planning import ErrorCurve, ProfileFit
    from posthoc_cli.synthesis.judging import Judged

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
    dtype: Annotated[
        str,
        typer.Option(
            autocompletion=one_of(*DTYPES.values()), help="Of the schedule: snapshots in float16, bfloat16 or float32."
        ),
    ] = "float16",
    like: LikeOption = None,
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
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the profile error too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the curves as one JSON object.")] = False,
) -> None:
    """Draw how exact averages of any length will be.

    For directories after training, or for schedules before it.

    The curve is the predicted error: the expected relative L2 distance of the weights from the true average. That of
    a schedule is what ema plan expects, if the network moves evenly, or as in the run that --like names. Tracked
    profiles are marked; the range below 1 % is shaded and named in the title. With --verbose or --method paper the
    profile error, the published measure, is shown too: the relative L2 distance between the wanted profile and the
    one that the snapshots make.

    --beta, --window, --between and --profile add targets of other kinds: points at the targets' own width (standard
    deviation / t), and drawings over training time as by --draw.
    """
    if out is None and csv_out is None and not as_json:
        raise InvalidValueError("--out", "name a picture (.png, .svg, .pdf), or ask for --csv or --json")
    out, csv_out = (None if path is None else files.expanded(path) for path in (out, csv_out))
    if out is not None and out.suffix not in PICTURES:
        raise InvalidValueError("--out", f"must end in {', '.join(PICTURES)}", value=out)
    if out is not None and out == csv_out:
        raise InvalidValueError("--csv", "is the picture's name too", "take another", value=csv_out)
    if csv_out is not None and csv_out.suffix != ".csv":
        raise InvalidValueError("--csv", "must end in .csv", value=csv_out)
    for path, option in ((out, "--out"), (csv_out, "--csv")):
        if path is not None:
            check_output(path, option, force)
    targets = parse_targets(draw, beta, window, between, profile, "--draw")
    ends = parse_sigma_range(sigma_range)
    judged = _judged(
        directories or [], t, sigma_rels or [], steps or [], checkpoint_every or [], max_checkpoints or [], dtype, like
    )
    rows = len(targets) * len(judged)
    if out is not None and rows > MOST_ROWS:
        raise InvalidValueError(
            "--out", f"{rows} drawings over training time; at most {MOST_ROWS} go into it", value=out
        )
    others = [target for target in targets if target.sigma_rel is None]
    profile_error = verbose or method == "paper"
    curves = [each.curve(ends, others, t, method) for each in judged]
    if out is not None:
        fits = [each.fit(target, t, method) for target in targets for each in judged]
        _draw(out, curves, fits, profile_error, force)
    if csv_out is not None:
        _write_csv(csv_out, curves, force)
    if as_json:
        output.print_json({"curves": [_curve_json(curve) for curve in curves]})
    else:
        _print_summary(curves, profile_error, [path for path in (out, csv_out) if path is not None])


def _judged(
    directories: list[Path],
    t: float | None,
    sigma_rels: list[str],
    steps: list[str],
    every: list[str],
    most: list[str],
    dtype: str,
    like: Path | None,
) -> list[Judged]:
    """What to draw: a run for each directory, as of `t`, and a schedule for each --sigma-rels."""
    from posthoc_cli.planning import Schedule, relative_rounding
    from posthoc_cli.synthesis.judging import Judged

    if not sigma_rels and (steps or every or most or like):
        raise InvalidValueError(
            "--sigma-rels", "is missing; --steps and the like describe a schedule of tracked widths"
        )
    dtype = DTYPES.get(dtype, dtype)
    rounding = relative_rounding(dtype)
    for directory in directories:
        existing_directory(directory)
    judged = [Judged.of_directory(directory, t) for directory in directories]
    for index, widths in enumerate(sigma_rels):
        length = _nth(steps, index, len(sigma_rels), "--steps")
        earlier = read_likeness(like, length)
        schedule = Schedule(
            tuple(parse_sigma_rels(widths, "--sigma-rels")),
            length,
            _nth(every, index, len(sigma_rels), "--checkpoint-every"),
            _nth(most, index, len(sigma_rels), "--max-checkpoints") if most else None,
            earlier.rounding.get(dtype, rounding),
        )
        judged.append(Judged.of_schedule(schedule, earlier.motion, assumption_text(like, earlier)))
    if not judged:
        raise InvalidValueError(
            "name a directory of snapshots, or a schedule", "--sigma-rels, --steps, --checkpoint-every"
        )
    return judged


def _nth(values: list[str], index: int, schedules: int, option: str) -> int:
    """The value for one schedule: one for all, or one each."""
    if not values:
        raise InvalidValueError(option, "is missing; a schedule needs it")
    if len(values) not in (1, schedules):
        raise InvalidValueError(
            option, f"give it once, or once for each --sigma-rels ({schedules}); it came {len(values)} times"
        )
    return parse_count(values[0] if len(values) == 1 else values[index], option)


def _draw(out: Path, curves: list[ErrorCurve], fits: list[ProfileFit], profile_error: bool, force: bool) -> None:
    from posthoc_cli import plots

    draw = partial(plots.error_figure, curves, fits, profile_error)
    files.write_whole(out, plots.as_file(draw, out.suffix), force)


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
    along = zip(
        ["sigma_rel"] * count, curve.sigma_rels.tolist(), _predicted(curve), curve.profile_error.tolist(), strict=True
    )
    others = [
        (other.label, other.sigma_rel, output.finite(other.predicted_error), other.profile_error)
        for other in curve.others
    ]
    return [*along, *others]


def _predicted(curve: ErrorCurve) -> list[float | None]:
    """The predicted errors; None for one that JSON has no number for."""
    return [output.finite(error) for error in curve.error.tolist()]


def _harmless(text: str) -> str:
    """A cell that a spreadsheet will not take for a formula; what is no text (tabs, line ends) is escaped."""
    return f"'{printable(text)}" if text.lstrip()[:1] in _FORMULAS else printable(text)


def _curve_json(curve: ErrorCurve) -> dict[str, Any]:
    return {
        "label": curve.label,
        "t": curve.t,
        "tracked": list(curve.tracked),
        "assumption": curve.assumption or None,
        "below_1_percent": [list(ends) for ends in curve.ranges_below(0.01)],
        "sigma_rel": curve.sigma_rels.tolist(),
        "predicted_error": _predicted(curve),
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


def _print_summary(curves: list[ErrorCurve], profile_error: bool, written: list[Path]) -> None:
    for curve in curves:
        output.print_line(curve.label)
        tracked = ", ".join(f"{s:g}" for s in curve.tracked)
        below = curve.ranges_text(0.01) or "none"
        output.print_pairs([("  tracked", tracked), ("  predicted error below 1 %", f"sigma_rel {below}")])
        rows = [
            [
                f"  {other.label}",
                f"{other.sigma_rel:.3g}",
                output.percent(other.predicted_error),
                *([output.percent(other.profile_error)] if profile_error else []),
            ]
            for other in curve.others
        ]
        if rows:
            columns = ["  target", "width", "predicted error", *(["profile error"] if profile_error else [])]
            output.print_table(columns, rows, left=["  target"])
    output.print_line(f"wrote {', '.join(map(str, written))}")


COMMAND = error_plot
