"""`ema verify`: whether everything is as it was written, and setting aside what is not."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import output
from posthoc_cli.cli.values import JsonOption, YesOption, existing
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
        bool, typer.Option("--repair", help="Set aside what is broken in a snapshot directory: in DIR/quarantine.")
    ] = False,
    clean: Annotated[
        bool, typer.Option("--clean", help="Delete the temporaries that interrupted writes have left.")
    ] = False,
    yes: YesOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what --repair or --clean would do; change nothing.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="A line for each file, not only for those with something wrong.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of snapshots, outputs and states.

    Reads everything: checksums, headers against content, nan and infinity, profiles against times, whether all is of
    one run. Exit code 1 if anything is wrong. Gaps in the schedule are only noted, since deleting is allowed.

    --repair moves broken snapshots, and other broken files beside them, to DIR/quarantine, deletes nothing, and
    shows how the predicted error changes. --clean deletes leftovers that have been unchanged for a minute; for
    an hour where a folder has no snapshots. Both only while no tracker writes to the directory; both ask.
    """
    if (yes or dry_run) and not (repair or clean):
        raise InvalidValueError("--yes" if yes else "--dry-run", "goes with --repair or --clean")
    if repair or clean:
        if as_json and not (yes or dry_run):
            raise InvalidValueError("--json", "shows what is changed only afterwards", "add --yes or --dry-run")
        if not (yes or dry_run or sys.stdin.isatty()):
            raise InvalidValueError("--yes", "is needed without a terminal; --dry-run shows what would be done")
    asked = _Asked(deep, repair, clean, yes, dry_run, verbose, as_json)
    # All are looked up first: reading takes long, and a wrong path is known at once.
    done = [_verify(path, asked) for path in [existing(path) for path in paths]]
    reports = [report for report, _ in done]
    if as_json:
        output.print_json(reports[0] if len(reports) == 1 else {"kind": "several", "paths": reports})
    if not all(fine for _, fine in done):
        raise typer.Exit(1)


COMMAND = verify


@dataclass(frozen=True)
class _Asked:
    """The options of these names."""

    deep: bool
    repair: bool
    clean: bool
    yes: bool
    dry_run: bool
    verbose: bool
    as_json: bool

    def agreed(self, anything: bool, question: str) -> bool:
        """Whether to change something. Asked without the lock, so that an open question does not stop a training."""
        return anything and not self.dry_run and (self.yes or typer.confirm(question, err=True))


def _verify(path: Path, asked: _Asked) -> tuple[dict[str, Any], bool]:
    """Verify a path, print the findings, repair and clean it where asked: its report, and whether all is fine now."""
    from posthoc_cli.run import check_path
    from posthoc_cli.snapshots import repair

    found = check_path(path, asked.deep, output.progress_bar())
    report = found.to_dict()
    plan = repair.plan_repair(found) if asked.repair else None
    cleaning = repair.Cleaning() if asked.clean else None
    if not asked.as_json:
        _print(found, asked.verbose, offer=plan is None)
        _print_loss(plan) if plan is not None and plan.gone else None
    if plan is not None and asked.agreed(bool(plan.gone), _question(plan)):
        plan = repair.repair(plan)
    count = output.counted(len(found.leftovers), "leftover")
    if cleaning is not None and asked.agreed(bool(found.leftovers), f"delete {count} for good?"):
        cleaning = repair.clean(found)
    if plan is not None:
        report["repair"] = plan.to_dict()
        _print_repair(plan, asked) if not asked.as_json else None
    if cleaning is not None:
        report["clean"] = cleaning.to_dict()
        _print_cleaning(found, cleaning, asked) if not asked.as_json else None
    wrong = plan.staying if plan is not None and (plan.done or not plan.gone) else found.broken
    return report, not (found.problems or wrong)


def _question(plan: Repair) -> str:
    return f"set {output.counted(len(plan.gone), 'file')} aside in {plan.directory / 'quarantine'}?"


# --- what is printed -------------------------------------------------------------------------------


def _print(found: Verification, verbose: bool, offer: bool) -> None:
    fine = [report for report in found.files if report.is_fine]
    listed = fine if verbose or len(fine) <= output.MOST_ROWS else []
    rows = [[found.name(report.path), report.what, report.state] for report in listed]
    if rows:
        output.print_table(["file", "what", "state"], rows, left=["file", "what", "state"])
    elif fine:
        output.print_line(f"{output.counted(len(fine), 'file')} with nothing wrong; --verbose lists them")
    for report in found.files:
        if not report.is_fine:
            output.print_line(f"{found.name(report.path)}: {report.what}: {_state(report)}")
    for path in found.leftovers:
        output.print_line(f"{found.name(path)}: left by an interrupted write, or by one in progress")
    output.print_line("") if found.files or found.leftovers else None
    for note in found.notes:
        output.print_line(f"note: {note}")
    for problem in found.problems:
        output.print_line(f"problem: {problem}")
    if found.leftovers and offer:
        output.print_line(f"note: `ema verify {found.path} --clean` deletes what interrupted writes have left")
    output.print_line(_summary(found, offer))


def _state(report: FileReport) -> str:
    """What is wrong with a file, in words."""
    if report.detail.startswith(report.state):
        return report.detail
    return f"{report.state}: {report.detail}" if report.detail else report.state


def _summary(found: Verification, offer: bool) -> str:
    from posthoc_cli.snapshots.check import UNCHECKED
    from posthoc_cli.snapshots.repair import MOVED, is_snapshot_directory

    count = len(found.files)
    wrong = [report for report in found.files if not report.is_fine]
    if not wrong:
        unchecked = sum(report.state == UNCHECKED for report in found.files)
        what = "all intact" if not unchecked else f"{count - unchecked:,} intact, {unchecked:,} without checksums"
        size = output.size_text(found.nbytes)
        return f"{output.counted(count, 'file')}, {size} verified in {found.seconds:.1f} s: {what}"
    named = ", ".join(found.name(report.path) for report in wrong[:3])
    more = f" and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
    states = {report.state for report in wrong}
    what = states.pop() if len(states) == 1 else "not in order"
    verb = "is" if len(wrong) == 1 else "are"
    text = f"{len(wrong):,} of {output.counted(count, 'file')} {verb} {what}: {named}{more}"
    repairs = offer and is_snapshot_directory(found) and any(report.state in MOVED for report in wrong)
    return text + f"; `ema verify {found.path} --repair` sets aside what is broken" * repairs


def _print_loss(plan: Repair) -> None:
    """The errors now, as far as headers tell, and without what goes."""
    from posthoc_cli.snapshots.repair import SIGMA_RELS

    before, after = plan.before, plan.after
    if after is None:
        output.print_line("predicted errors: unknown without what is broken")
        return
    names = [*(f"{sigma_rel:g}" for sigma_rel in SIGMA_RELS), "worst"]
    now = [None] * len(names) if before is None else [*before.predicted, before.worst]
    columns = zip(names, map(output.percent, now), map(output.percent, [*after.predicted, after.worst]), strict=True)
    output.print_line("")
    output.print_table(["sigma_rel", "predicted error", "without what is broken"], list(columns))
    where = f"at t = {after.t:,.12g}"
    if before is not None and before.t != after.t:
        where = f"at t = {before.t:,.12g}, and then at t = {after.t:,.12g}"
    if after.solved < after.count:
        where += f"; from {after.solved:,} of {after.count:,} snapshots"
    if plan.unknown:
        where += f"; {plan.unknown:,} with a damaged header {'is' if plan.unknown == 1 else 'are'} in neither column"
    output.print_line(where)


def _print_repair(plan: Repair, asked: _Asked) -> None:
    where = plan.directory / "quarantine"
    if not plan.gone:
        output.print_line("nothing has to be set aside")
    elif plan.done:
        output.print_line(f"set {output.counted(len(plan.moved), 'file')} aside in {where}")
    elif asked.dry_run:
        output.print_line(f"would set {output.counted(len(plan.gone), 'file')} aside in {where}; nothing was moved")
    else:
        output.print_line("nothing was moved")
    if plan.staying:
        names = ", ".join(report.path.name for report in plan.staying[:3]) + ", ..." * (len(plan.staying) > 3)
        output.print_line(f"{names}: left where {'it is' if len(plan.staying) == 1 else 'they are'}; see above")


def _print_cleaning(found: Verification, cleaning: Cleaning, asked: _Asked) -> None:
    if not found.leftovers:
        output.print_line("no leftovers")
    elif cleaning.done:
        for path, why in cleaning.left:
            output.print_line(f"{found.name(path)}: left, since it {why}")
        output.print_line(f"deleted {output.counted(len(cleaning.removed), 'leftover')}")
    elif asked.dry_run:
        output.print_line(f"would delete {output.counted(len(found.leftovers), 'leftover')}; nothing was deleted")
    else:
        output.print_line("nothing was deleted")
