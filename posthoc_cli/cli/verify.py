"""`ema verify`: whether everything is as it was written, and setting aside what is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Argument

from posthoc_cli import resources
from posthoc_cli.cli import output, values
from posthoc_cli.errors import PostHocError, percent

if TYPE_CHECKING:
    from posthoc_cli.snapshots.check import Verification

EPILOG = "Example:  ema verify run/ema   or   ema verify run/ema --repair   or   ema verify out/ m.safetensors --json"


def verify(
    paths: list[Path] = Argument(
        ..., metavar="DIR|FILE", help="Snapshots, outputs, states, parts or shards; or such files."
    ),
    repair: bool = values.flag(
        values.HOW, "--repair", help="Move what is broken in a snapshot directory to DIR/damaged; asks first."
    ),
    yes: bool = values.YES,
    as_json: bool = values.JSON,
) -> None:
    """Check every byte of snapshots, outputs and states.

    Reads everything: checksums, headers against content, nan and infinity, whether all is of one run. Exit code 1 if
    anything is wrong. Of safetensors files of other programs, which have no checksums, the structure is checked.

    --repair moves broken files of a snapshot directory to DIR/damaged, deletes nothing, and shows the new predicted
    error. It asks first, and works only while no tracker writes to the directory.
    """
    from posthoc_cli.run import Run
    from posthoc_cli.snapshots.check import check_repairable

    if repair:
        values.check_confirmation(yes, as_json)
    reports: list[dict[str, Any]] = []
    fine = True
    # All paths are checked first, since reading takes long.
    for path in [values.existing(path) for path in paths]:
        found = Run(path).check(output.progress_bar())
        report, broken = found.to_dict(), bool(found.broken)
        if repair:
            check_repairable(found)
        if not as_json:
            if len(paths) > 1:  # files are named within their path
                if reports:
                    output.print_line()
                output.print_line(f"{found.path}:")
            _print(found, offer=not repair)
        if repair:
            moved = _repair(found, yes, as_json)
            told = {"gone": found.going, "moved": moved or ()}
            report["repair"] = {key: [found.name(one) for one in each] for key, each in told.items()}
            report["repair"]["done"] = moved is not None
            broken = broken if found.going and moved is None else bool(found.staying)
        reports.append(report)
        fine = fine and not (found.problems or broken)
    if as_json:
        output.print_json(reports[0] if len(reports) == 1 else {"kind": "several", "paths": reports})
    if not fine:
        raise typer.Exit(1)


def _repair(found: Verification, yes: bool, as_json: bool) -> tuple[Path, ...] | None:
    """The new paths of what was set aside; None if nothing was to be."""
    from posthoc_cli.snapshots.check import repair

    what, moved = f"{output.counted(len(found.going), 'file')} aside in {found.path / 'damaged'}", None
    # Asked without the lock, so that an open question does not stop a training.
    if found.going and (yes or typer.confirm(f"set {what}?", err=True)):
        moved = repair(found)
    if not as_json:
        output.print_outcome([*found.going], moved is not None, False, "", f"set {what}", "set aside")
        if moved:
            _print_error(found.path)
        if found.staying:
            names = ", ".join(report.path.name for report in found.staying[:3]) + ", ..." * (len(found.staying) > 3)
            output.print_line(f"{names}: left where {'it is' if len(found.staying) == 1 else 'they are'}; see above")
    return moved


def _print(found: Verification, offer: bool) -> None:
    fine = [report for report in found.files if report.is_fine]
    listed = fine if len(fine) <= output.MOST_ROWS else []
    rows = [[found.name(report.path), report.what, report.state] for report in listed]
    if rows:
        output.print_table(["file", "what", "state"], rows, left=["file", "what", "state"])
    elif fine:
        output.print_line(f"{output.counted(len(fine), 'file')} with nothing wrong; --json lists them")
    for report in found.files:
        if not report.is_fine:
            state = f"{report.state}: " * (not report.detail.startswith(report.state)) + report.detail
            output.print_line(f"{found.name(report.path)}: {report.what}: {state.removesuffix(': ')}")
    for path in found.leftovers:
        output.print_line(f"{found.name(path)}: left by an interrupted write, or by one in progress")
    if found.files or found.leftovers:
        output.print_line()
    for note in found.notes:
        output.print_line(f"note: {note}")
    for problem in found.problems:
        output.print_line(f"problem: {problem}")
    output.print_line(_summary(found, offer))


def _summary(found: Verification, offer: bool) -> str:
    from posthoc_cli.snapshots.check import MOVED, UNCHECKED

    count = len(found.files)
    wrong = [report for report in found.files if not report.is_fine]
    if not wrong:
        unchecked = sum(report.state == UNCHECKED for report in found.files)
        what = "all intact" if not unchecked else f"{count - unchecked:,} intact, {unchecked:,} without checksums"
        size = resources.size_text(found.nbytes)
        return f"{output.counted(count, 'file')}, {size} verified in {found.seconds:.1f} s: {what}"
    named = ", ".join(found.name(report.path) for report in wrong[:3])
    more = f" and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
    states = {report.state for report in wrong}
    what = states.pop() if len(states) == 1 else "not in order"
    verb = "is" if len(wrong) == 1 else "are"
    text = f"{len(wrong):,} of {output.counted(count, 'file')} {verb} {what}: {named}{more}"
    repairs = offer and found.is_of_tracker and any(report.state in MOVED for report in wrong)
    return text + f"; `ema verify {found.path} --repair` sets aside what is broken" * repairs


def _print_error(directory: Path) -> None:
    """The largest error to expect now of what is left."""
    from posthoc_cli.planning import USEFUL_RANGE
    from posthoc_cli.run import Run
    from posthoc_cli.snapshots.directory import read_directory

    low, high = USEFUL_RANGE
    try:
        read_directory(directory)  # an error where no snapshot is left
        worst = float(Run(directory).error_curve(USEFUL_RANGE).predicted_error.max())
        known = f"at most {percent(worst)} for sigma_rel {low:g} to {high:g}"
    except PostHocError as error:
        known = f"unknown, {error.reason}"
    output.print_line(f"predicted error now: {known}")
