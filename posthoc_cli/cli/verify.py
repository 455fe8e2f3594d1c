"""`ema verify`: whether everything is as it was written, and setting aside what is not."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import output
from posthoc_cli.cli.values import existing
from posthoc_cli.errors import InvalidValueError

if TYPE_CHECKING:
    from posthoc_cli.snapshots.check import FileReport, Verification
    from posthoc_cli.snapshots.repair import Cleaning, Repair

EPILOG = "Example:  ema verify run/ema   or   ema verify run/ema --repair   or   ema verify out/ m.safetensors --json"


def verify(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="DIR|FILE...", help="Snapshots, outputs, states, parts or shards; or such files."),
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compare the values with what was measured when they were written.")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Set aside what is broken in a snapshot directory: in DIR/quarantine."),
    ] = False,
    clean: Annotated[
        bool, typer.Option("--clean", help="Delete the temporaries that interrupted writes have left.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, with --repair or --clean.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what --repair or --clean would do; change nothing.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="A line for each file, and not only for those with something wrong."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check every byte of snapshots, outputs and states.

    Reads everything: checksums, headers against content, nan and infinity, profiles against times, whether all is of
    one run. Exit code 1 when anything is wrong. Gaps in the schedule are only noted, since deleting is allowed.

    --repair moves broken snapshots, and whatever else is broken beside them, to DIR/quarantine, deletes nothing, and
    says what the loss does to the predicted error. --clean deletes leftovers that have been still for a minute; for
    an hour where a folder has no snapshots. Both only while no tracker writes to the directory; both ask.
    """
    output.log_to_stderr(False)
    _check_options(repair or clean, yes, dry_run, as_json)
    asked = _Asked(repair, clean, yes, dry_run, verbose, as_json)
    # All of them are looked up first: reading takes long, and a wrong path is known at once.
    done = [_verify_one(path, deep, asked) for path in [existing(path) for path in paths]]
    if as_json:
        output.print_json(
            done[0].report if len(done) == 1 else {"kind": "several", "paths": [one.report for one in done]}
        )
    if not all(one.fine for one in done):
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Asked:
    """What to do and to show besides; see the options of these names."""

    repair: bool
    clean: bool
    yes: bool
    dry_run: bool
    verbose: bool
    as_json: bool


@dataclass(frozen=True)
class _Done:
    """What came of one path: its report as data, and whether nothing is wrong with what stays there."""

    report: dict[str, Any]
    fine: bool


def _verify_one(path: Path, deep: bool, asked: _Asked) -> _Done:
    """Read a path, print what was found, and repair and clean it where that was asked for."""
    from posthoc_cli.snapshots import repair

    found = _read(path, deep)
    plan = repair.plan_repair(found) if asked.repair else None
    if not asked.as_json:
        _print(found, found.seconds, asked.verbose, plan is None)
        _print_loss(plan) if plan is not None and plan.gone else None
    repaired = plan is not None and _agreed(bool(plan.gone), asked, _question(plan.directory, plan.gone))
    plan = repair.repair(plan) if plan is not None and repaired else plan
    cleaned = asked.clean and _agreed(
        bool(found.leftovers), asked, f"delete {_counted(len(found.leftovers), 'leftover')} for good?"
    )
    cleaning = repair.clean(found) if cleaned else repair.Cleaning()
    if not asked.as_json:
        _print_repair(plan, asked.dry_run) if plan is not None else None
        _print_cleaning(found, cleaning, asked.dry_run) if asked.clean else None
    report = found.to_dict()
    report |= {} if plan is None else {"repair": plan.to_dict()}
    report |= {"clean": cleaning.to_dict()} if asked.clean else {}
    wrong = plan.staying if plan is not None and (repaired or not plan.gone) else found.broken
    return _Done(report, not (found.problems or wrong))


def _read(path: Path, deep: bool) -> Verification:
    from posthoc_cli.snapshots.check import list_contents, verify_measurements
    from posthoc_cli.snapshots.check import verify as check
    from posthoc_cli.snapshots.deep import deep_bytes

    contents = list_contents(path)
    with output.progress_bar("verifying", contents.nbytes, False) as progress:
        found = check(contents, progress)
    if not deep:
        return found
    with output.progress_bar("measuring", deep_bytes(found.snapshots), False) as progress:
        return verify_measurements(found, progress)


def _check_options(changes: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    if not changes:
        if yes or dry_run:
            raise InvalidValueError("--yes" if yes else "--dry-run", "goes with --repair or --clean")
        return
    if as_json and not (yes or dry_run):
        raise InvalidValueError("--json", "shows what would change only afterwards", "give --yes or --dry-run with it")
    if not (yes or dry_run or sys.stdin.isatty()):
        raise InvalidValueError("--yes", "is needed where nobody can be asked; --dry-run shows what would be done")


def _agreed(anything: bool, asked: _Asked, question: str) -> bool:
    """Whether to go on. Asked without the lock: a question that nobody answers must not stop a training."""
    return anything and not asked.dry_run and (asked.yes or typer.confirm(question, err=True))


def _question(directory: Path, gone: tuple[Path, ...]) -> str:
    return f"set {_counted(len(gone), 'file')} aside in {directory / 'quarantine'}?"


# --- as text ---------------------------------------------------------------------------------------


def _print(found: Verification, seconds: float, verbose: bool, offer: bool) -> None:
    fine = [report for report in found.files if report.is_fine]
    listed = fine if verbose or len(fine) <= output.MOST_ROWS else []
    rows = [[found.name(report.path), report.what, report.state] for report in listed]
    if rows:
        output.print_table(["file", "what", "state"], rows, left=["file", "what", "state"])
    elif fine:
        output.print_line(f"{_counted(len(fine), 'file')} with nothing wrong; --verbose lists them")
    for report in found.files:
        if not report.is_fine:
            output.print_line(f"{found.name(report.path)}: {report.what}: {_state(report)}")
    for path in found.leftovers:
        output.print_line(f"{found.name(path)}: left by an interrupted write, or by one under way")
    output.print_line("") if found.files or found.leftovers else None
    for note in found.notes:
        output.print_line(f"note: {note}")
    for problem in found.problems:
        output.print_line(f"problem: {problem}")
    if found.leftovers and offer:
        output.print_line(f"note: `ema verify {found.path} --clean` deletes what interrupted writes have left")
    output.print_line(_summary(found, seconds, offer))


def _state(report: FileReport) -> str:
    """What is wrong with a file, in words."""
    if report.detail.startswith(report.state):
        return report.detail
    return f"{report.state}: {report.detail}" if report.detail else report.state


def _summary(found: Verification, seconds: float, offer: bool) -> str:
    from posthoc_cli.snapshots.check import UNCHECKED
    from posthoc_cli.snapshots.repair import MOVED, is_snapshot_directory

    count = len(found.files)
    wrong = [report for report in found.files if not report.is_fine]
    if not wrong:
        unchecked = sum(report.state == UNCHECKED for report in found.files)
        what = "all whole" if not unchecked else f"{count - unchecked:,} whole, {unchecked:,} without checksums"
        return f"{_counted(count, 'file')}, {output.size_text(found.nbytes)} verified in {seconds:.1f} s: {what}"
    named = ", ".join(found.name(report.path) for report in wrong[:3])
    more = f" and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
    states = {report.state for report in wrong}
    what = states.pop() if len(states) == 1 else "not in order"
    verb = "is" if len(wrong) == 1 else "are"
    text = f"{len(wrong):,} of {_counted(count, 'file')} {verb} {what}: {named}{more}"
    return (
        f"{text}; `ema verify {found.path} --repair` sets aside what is broken"
        if offer and is_snapshot_directory(found) and any(report.state in MOVED for report in wrong)
        else text
    )


def _print_loss(plan: Repair) -> None:
    """What the errors are now, as far as headers tell, and without what goes."""
    from posthoc_cli.snapshots.repair import SIGMA_RELS

    before, after = plan.before, plan.after
    if after is None:
        output.print_line("predicted errors: none can be given without what is broken")
        return
    rows = [
        [
            f"{sigma_rel:g}",
            output.percent(None if before is None else float(before.predicted[k])),
            output.percent(float(after.predicted[k])),
        ]
        for k, sigma_rel in enumerate(SIGMA_RELS)
    ]
    rows.append(["worst", output.percent(None if before is None else before.worst), output.percent(after.worst)])
    output.print_line("")
    output.print_table(["sigma_rel", "predicted error", "without what is broken"], rows)
    where = f"at t = {after.t:,.12g}"
    if before is not None and before.t != after.t:
        where = f"at t = {before.t:,.12g}, and then at t = {after.t:,.12g}"
    if after.solved < after.count:
        where += f"; from {after.solved:,} of {after.count:,} snapshots"
    if plan.unknown:
        where += f"; {plan.unknown:,} whose header is damaged {'is' if plan.unknown == 1 else 'are'} in neither column"
    output.print_line(where)


def _print_repair(plan: Repair, dry_run: bool) -> None:
    where = plan.directory / "quarantine"
    if not plan.gone:
        output.print_line("nothing has to be set aside")
    elif plan.done:
        output.print_line(f"set {_counted(len(plan.moved), 'file')} aside in {where}")
    elif dry_run:
        output.print_line(f"would set {_counted(len(plan.gone), 'file')} aside in {where}; nothing was moved")
    else:
        output.print_line("nothing was moved")
    if plan.staying:
        names = ", ".join(report.path.name for report in plan.staying[:3]) + ", ..." * (len(plan.staying) > 3)
        output.print_line(f"{names}: left where {'it is' if len(plan.staying) == 1 else 'they are'}; see above")


def _print_cleaning(found: Verification, cleaning: Cleaning, dry_run: bool) -> None:
    if not found.leftovers:
        output.print_line("no leftovers")
    elif cleaning.done:
        for path, why in cleaning.left:
            output.print_line(f"{found.name(path)}: left, since it {why}")
        output.print_line(f"deleted {_counted(len(cleaning.removed), 'leftover')}")
    elif dry_run:
        output.print_line(f"would delete {_counted(len(found.leftovers), 'leftover')}; nothing was deleted")
    else:
        output.print_line("nothing was deleted")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


COMMAND = verify
