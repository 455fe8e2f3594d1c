"""`ema verify`: a check that files are as they were written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Argument

from posthoc_cli import resources
from posthoc_cli.cli import output, values

if TYPE_CHECKING:
    from posthoc_cli.snapshots.verify import Verification

EPILOG = "Example:  ema verify run/ema   or   ema verify out/ m.safetensors --json"


def verify(
    paths: list[Path] = Argument(
        ..., metavar="DIR|FILE", help="Directories or files: snapshots, outputs, states, parts or shards."
    ),
    as_json: bool = values.JSON,
) -> None:
    """Check every byte of snapshots, outputs and states.

    Reads all files and checks checksums, headers against contents, nan and infinity, and that all files belong to one
    run. Exit code 1 if anything is wrong. Files of other programs have no checksums: only their structure is checked.

    Move a broken snapshot out of its directory: the others work without it.
    """
    from posthoc_cli.run import Run

    reports: list[dict[str, Any]] = []
    fine = True
    # All paths are checked first, since reading takes long.
    for path in [values.existing(path) for path in paths]:
        check = Run(path).check(output.progress_bar())
        if not as_json:
            if len(paths) > 1:  # files are named relative to their path
                if reports:
                    output.print_line()
                output.print_line(f"{check.path}:")
            _print(check)
        reports.append(check.to_dict())
        fine = fine and check.is_fine
    if as_json:
        output.print_json(reports[0] if len(reports) == 1 else {"kind": "several", "paths": reports})
    if not fine:
        raise typer.Exit(1)


def _print(check: Verification) -> None:
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
    output.print_line(_summary(check))


def _summary(check: Verification) -> str:
    """Return the last line: how many files are intact, or which are not."""
    from posthoc_cli.snapshots.verify import UNCHECKED

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
    return f"{len(wrong):,} of {output.counted(count, 'file')} {verb} {verdict}: {names}{more}"
