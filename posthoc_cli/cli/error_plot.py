"""`ema error-plot`: reconstruction error against sigma_rel, for directories or for schedules not yet run."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import output
from posthoc_cli.cli.values import parse_numbers, parse_sigma_rels
from posthoc_cli.errors import InvalidValueError, OutputExistsError

if TYPE_CHECKING:
    from posthoc_cli.planning import Candidate, ErrorCurve

EPILOG = (
    "Example:  ema error-plot run/ema --out error.png   or, before training,   "
    "ema error-plot --sigma-rels 0.05,0.28 --steps 100000 --checkpoint-every 1000 --max-checkpoints 20 --out plan.png"
)

PICTURES = (".png", ".svg", ".pdf")


def error_plot(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Directories that trackers wrote.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The picture: .png, .svg or .pdf.")] = None,
    sigma_rels: Annotated[
        list[str] | None,
        typer.Option(
            help="A schedule not yet run: tracked widths, such as 0.05,0.28. Give it again for another schedule."
        ),
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Of the schedule: length of training.")] = None,
    checkpoint_every: Annotated[
        list[int] | None, typer.Option(help="Of the schedule: steps between snapshots.")
    ] = None,
    max_checkpoints: Annotated[
        list[int] | None, typer.Option(help="Of the schedule: snapshots kept a profile. [default: all]")
    ] = None,
    profiles: Annotated[
        str | None,
        typer.Option(help="Also draw these targets over training time, and their coefficients: 0.15 or a list."),
    ] = None,
    sigma_range: Annotated[str, typer.Option(help="The horizontal axis: LOW:HIGH.")] = "0.01:0.2886",
    t: Annotated[float | None, typer.Option(help="Time of the targets. [default: the last snapshot's]")] = None,
    method: Annotated[str | None, typer.Option(help="The solver: paper. [default: paper]")] = None,
    csv_out: Annotated[Path | None, typer.Option("--csv", help="Write the curves as a table too.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the curves as one JSON object.")] = False,
) -> None:
    """Draw how exact averages of any length will be.

    For directories after training, or for schedules before it.
    The curve is the relative L2 distance between the wanted profile and the nearest one that the snapshots
    make. Tracked profiles are marked; the range below 1 % is shaded and named in the title.
    """
    from posthoc_cli.planning import error_curve

    if out is None and csv_out is None and not as_json:
        raise InvalidValueError("--out: name a picture (.png, .svg, .pdf), or ask for --csv or --json")
    out, csv_out = (None if path is None else path.expanduser() for path in (out, csv_out))
    if out is not None and out.suffix not in PICTURES:
        raise InvalidValueError(f"--out {out}: must end in {', '.join(PICTURES)}")
    if out is not None and out == csv_out:
        raise InvalidValueError(f"--csv {csv_out}: is the picture's name too; take another")
    targets = [] if profiles is None else parse_sigma_rels(profiles)
    low, high = _parse_range(sigma_range)
    candidates = _candidates(
        directories or [], sigma_rels or [], steps or [], checkpoint_every or [], max_checkpoints or []
    )
    for path in (out, csv_out):
        if path is not None and path.exists() and not force:
            raise OutputExistsError(f"{path}: is there already; choose another name, or --force to replace it")
    curves = [error_curve(candidate, (low, high), t=t, method=method) for candidate in candidates]
    if out is not None:
        _draw(out, candidates, curves, targets, t, method, force)
    if csv_out is not None:
        _write_csv(csv_out, curves, force)
    if as_json:
        output.print_json({"curves": [_curve_json(curve) for curve in curves]})
    else:
        _print_summary(curves, [path for path in (out, csv_out) if path is not None])


def _parse_range(text: str) -> tuple[float, float]:
    from posthoc_cli.planning import check_sigma_range

    ends = [parse_numbers(end, "--sigma-range") for end in text.split(":")]
    if len(ends) != 2 or any(len(end) != 1 for end in ends):
        raise InvalidValueError(f"--sigma-range {text}: must be LOW:HIGH, such as 0.05:0.28")
    return check_sigma_range((ends[0][0], ends[1][0]))


def _candidates(
    directories: list[Path], sigma_rels: list[str], steps: list[int], every: list[int], most: list[int]
) -> list[Candidate]:
    """What to draw: a run for each directory, a schedule for each --sigma-rels."""
    from posthoc_cli.planning import Candidate, Schedule
    from posthoc_cli.snapshots.store import read_directory

    if not sigma_rels and (steps or every or most):
        raise InvalidValueError("--sigma-rels: is missing; --steps and the like describe a schedule of tracked widths")
    candidates = []
    for directory in directories:
        snapshots = read_directory(directory.expanduser())
        profiles = [snapshot.info.profile.pure for snapshot in snapshots]
        unit = snapshots[0].info.t_unit
        label = f"{directory}: {len(profiles)} snapshots up to {profiles[-1].t:,.12g} {unit}"
        candidates.append(Candidate(label, profiles, unit))
    for index, widths in enumerate(sigma_rels):
        schedule = Schedule(
            tuple(parse_sigma_rels(widths)),
            _nth(steps, index, len(sigma_rels), "--steps"),
            _nth(every, index, len(sigma_rels), "--checkpoint-every"),
            _nth(most, index, len(sigma_rels), "--max-checkpoints") if most else None,
        )
        candidates.append(Candidate.of_schedule(schedule))
    if not candidates:
        raise InvalidValueError(
            "name a directory of snapshots, or a schedule: --sigma-rels, --steps, --checkpoint-every"
        )
    return candidates


def _nth(values: list[int], index: int, schedules: int, option: str) -> int:
    """The value for one schedule: one for all, or one each."""
    if not values:
        raise InvalidValueError(f"{option}: is missing; a schedule needs it")
    if len(values) not in (1, schedules):
        raise InvalidValueError(
            f"{option}: give it once, or once for each --sigma-rels ({schedules}); it came {len(values)} times"
        )
    return values[0] if len(values) == 1 else values[index]


def _draw(
    out: Path,
    candidates: list[Candidate],
    curves: list[ErrorCurve],
    targets: list[float],
    t: float | None,
    method: str | None,
    force: bool,
) -> None:
    from posthoc_cli import files, plots
    from posthoc_cli.planning import profile_fit

    fits = [profile_fit(candidate, target, t, method=method) for target in targets for candidate in candidates]
    figure = plots.error_figure(curves, fits)
    picture = io.BytesIO()
    figure.savefig(picture, format=out.suffix.removeprefix("."))
    files.write_whole(out, picture.getvalue(), force)


def _write_csv(path: Path, curves: list[ErrorCurve], force: bool) -> None:
    from posthoc_cli import files

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["curve", "t", "sigma_rel", "profile_error"])
    for curve in curves:
        for sigma_rel, error in zip(curve.sigma_rels, curve.profile_error, strict=True):
            writer.writerow([_harmless(curve.label), repr(curve.t), repr(float(sigma_rel)), repr(float(error))])
    files.write_whole(path, text.getvalue().encode(), force)


def _harmless(text: str) -> str:
    """A cell that a spreadsheet will not take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _curve_json(curve: ErrorCurve) -> dict[str, Any]:
    return {
        "label": curve.label,
        "t": curve.t,
        "tracked": list(curve.tracked),
        "below_1_percent": [list(ends) for ends in curve.ranges_below(0.01)],
        "sigma_rel": curve.sigma_rels.tolist(),
        "profile_error": curve.profile_error.tolist(),
    }


def _print_summary(curves: list[ErrorCurve], written: list[Path]) -> None:
    rows = []
    for curve in curves:
        good = ", ".join(f"{low:.3f} to {high:.3f}" for low, high in curve.ranges_below(0.01)) or "none"
        rows.append([curve.label, ", ".join(f"{s:g}" for s in curve.tracked), good])
    output.print_table(["snapshots", "tracked", "sigma_rel with profile error below 1 %"], rows, left=["snapshots"])
    output.print_line(f"wrote {', '.join(map(str, written))}")


COMMAND = error_plot
