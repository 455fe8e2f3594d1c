"""`ema verify`: a check that files are as they were written, and a repair that sets broken ones aside."""

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
        ..., metavar="DIR|FILE", help="Directories or files: snapshots, outputs, states, parts or shards."
    ),
    repair: bool = values.flag(
        values.HOW, "--repair", help="Move broken files of a snapshot directory to DIR/damaged; asks first."
    ),
    yes: bool = values.YES,
    as_json: bool = values.JSON,
) -> None:
    """Check every byte of snapshots, outputs and states.

    Reads all files and checks checksums, headers against contents, nan and infinity, and that all files belong to one
    run. Exit code 1 if anything is wrong. Files of other programs have no checksums: only their structure is checked.

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
        check = Run(path).check(output.progress_bar())
        report, broken = check.to_dict(), bool(check.broken)
        if repair:
            check_repairable(check)
        if not as_json:
            if len(paths) > 1:  # files are named relative to their path
                if reports:
                    output.print_line()
                output.print_line(f"{check.path}:")
            _print(check, offer=not repair)
        if repair:
            moved = _repair(check, yes, as_json)
            changes = {"gone": check.to_move, "moved": moved or ()}
            report["repair"] = {key: [check.name(file) for file in changed] for key, changed in changes.items()}
            report["repair"]["done"] = moved is not None
            broken = broken if check.to_move and moved is None else bool(check.not_moved)
        reports.append(report)
        fine = fine and not (check.problems or broken)
    if as_json:
        output.print_json(reports[0] if len(reports) == 1 else {"kind": "several", "paths": reports})
    if not fine:
        raise typer.Exit(1)


def _repair(check: Verification, yes: bool, as_json: bool) -> tuple[Path, ...] | None:
    """Set broken files aside, if the user agrees, and return their new paths; None if nothing was set aside."""
    from posthoc_cli.snapshots.check import repair

    what, moved = f"{output.counted(len(check.to_move), 'file')} aside in {check.path / 'damaged'}", None
    # The directory is not locked while the question is open, so that a training is not stopped.
    if check.to_move and (yes or typer.confirm(f"set {what}?", err=True)):
        moved = repair(check)
    if not as_json:
        output.print_outcome([*check.to_move], moved is not None, False, "", f"set {what}", "set aside")
        if moved:
            _print_error(check.path)
        if check.not_moved:
            names = ", ".join(report.path.name for report in check.not_moved[:3]) + ", ..." * (len(check.not_moved) > 3)
            output.print_line(f"{names}: not moved; see above")
    return moved


def _print(check: Verification, offer: bool) -> None:
    fine = [report for report in check.files if report.is_fine]
    listed = fine if len(fine) <= output.MOST_ROWS else []
    rows = [[check.name(report.path), report.what, report.state] for report in listed]
    if rows:
        output.print_table(["file", "what", "state"], rows, left=["file", "what", "state"])
    elif fine:
        output.print_line(f"{output.counted(len(fine), 'file')} with nothing wrong; --json lists them")
    for report in check.files:
        if not report.is_fine:
            state = f"{report.state}: " * (not report.detail.startswith(report.state)) + report.detail
            output.print_line(f"{check.name(report.path)}: {report.what}: {state.removesuffix(': ')}")
    for path in check.leftovers:
        output.print_line(f"{check.name(path)}: left by an interrupted write, or by one in progress")
    if check.files or check.leftovers:
        output.print_line()
    for note in check.notes:
        output.print_line(f"note: {note}")
    for problem in check.problems:
        output.print_line(f"problem: {problem}")
    output.print_line(_summary(check, offer))


def _summary(check: Verification, offer: bool) -> str:
    """Return the last line: how many files are intact, or which are not, and the repair if there is one to `offer`."""
    from posthoc_cli.snapshots.check import MOVED, UNCHECKED

    count = len(check.files)
    wrong = [report for report in check.files if not report.is_fine]
    if not wrong:
        unchecked = sum(report.state == UNCHECKED for report in check.files)
        verdict = "all intact" if not unchecked else f"{count - unchecked:,} intact, {unchecked:,} without checksums"
        size = resources.size_text(check.nbytes)
        return f"{output.counted(count, 'file')}, {size} verified in {check.seconds:.1f} s: {verdict}"
    names = ", ".join(check.name(report.path) for report in wrong[:3])
    more = f" and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
    states = {report.state for report in wrong}
    verdict = states.pop() if len(states) == 1 else "not in order"
    verb = "is" if len(wrong) == 1 else "are"
    text = f"{len(wrong):,} of {output.counted(count, 'file')} {verb} {verdict}: {names}{more}"
    repairs = offer and check.is_of_tracker and any(report.state in MOVED for report in wrong)
    return text + f"; `ema verify {check.path} --repair` sets broken files aside" * repairs


def _print_error(directory: Path) -> None:
    """Print the largest predicted error of averages from the remaining snapshots."""
    from posthoc_cli.planning import USEFUL_RANGE
    from posthoc_cli.run import Run
    from posthoc_cli.snapshots.directory import read_directory

    low, high = USEFUL_RANGE
    try:
        read_directory(directory)  # raises a DirectoryError if no snapshot is left
        worst = float(Run(directory).error_curve(USEFUL_RANGE).predicted_error.max())
        known = f"at most {percent(worst)} for sigma_rel {low:g} to {high:g}"
    except PostHocError as error:
        known = f"unknown, {error.reason}"
    output.print_line(f"predicted error now: {known}")
