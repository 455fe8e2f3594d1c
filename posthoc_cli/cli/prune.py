"""`ema prune`: delete the snapshots that matter least."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from posthoc_cli import resources
from posthoc_cli.cli import output, values
from posthoc_cli.errors import InvalidValueError, check_alone, percent

if TYPE_CHECKING:
    from posthoc_cli.snapshots.prune import Pruning

EPILOG = "Example:  ema prune run/ema --keep 20 --dry-run   or   ema prune run/ema --max-error 1e-3 --yes"


def prune(
    directory: Path = values.DIRECTORY,
    keep: str | None = values.HOW(None, metavar="COUNT", help="Keep this number of snapshots of each profile."),
    max_size: str | None = values.HOW(None, metavar="SIZE", help="Or keep as many as fit: 10GB, 500MiB."),
    max_error: str | None = values.HOW(
        None, metavar="ERROR", help="Or keep as few as hold the worst predicted error in the range to this: 1e-3."
    ),
    yes: bool = values.YES,
    dry_run: bool = values.flag(values.HOW, "--dry-run", help="Show what would be deleted; delete nothing."),
    sigma_range: str = values.SIGMA_RANGE,
    as_json: bool = values.JSON,
) -> None:
    """Delete the snapshots that matter least.

    Shows which snapshots would be deleted and the predicted error over the range without them, then asks. The newest
    snapshot of each profile is kept. Deletes only after every remaining snapshot was read and verified, and never while
    a tracker writes to the directory; an interruption leaves a valid directory.
    """
    from posthoc_cli.run import Run
    from posthoc_cli.snapshots.prune import file_bytes

    check_alone(1, keep=keep, max_size=max_size, max_error=max_error)
    count = values.optional(values.parse_count, keep, "--keep", "20")
    error = values.optional(values.parse_max_error, max_error)
    ends = values.parse_sigma_range(sigma_range)
    directory = values.existing(directory, directory=True)
    alternative = "; --dry-run shows what would be deleted"
    if as_json and not (yes or dry_run):
        raise InvalidValueError("--json", "cannot ask before files are changed", f"add --yes{alternative}")
    if not (yes or dry_run or sys.stdin.isatty()):
        raise InvalidValueError("--yes", f"is needed without a terminal{alternative}")

    def agree(planned: Pruning) -> bool:
        if not as_json:
            _print(planned, ends)
        return yes or typer.confirm(f"delete {output.counted(len(planned.to_delete), 'snapshot')} for good?", err=True)

    pruning = Run(directory).prune(
        keep=count, max_size=max_size, max_error=error, sigma_range=ends, dry_run=dry_run, agree=agree,
        progress=output.progress_bar(),
    )  # fmt: skip
    if as_json:
        output.print_json(pruning.to_dict())
    else:
        if dry_run or not pruning.to_delete:
            _print(pruning, ends)
        count_text = output.counted(len(pruning.to_delete), "snapshot")
        what = f"{count_text}, {resources.size_text(file_bytes(pruning.to_delete))}"
        if not pruning.to_delete:
            output.print_line("nothing has to be deleted")
        elif pruning.deleted:
            output.print_line(f"deleted {what}; {len(pruning.kept)} are left, verified")
        else:
            output.print_line(f"would delete {what}; " * dry_run + "nothing was deleted")
    if pruning.to_delete and not (pruning.deleted or dry_run):
        raise typer.Exit(1)


def _print(pruning: Pruning, sigma_range: tuple[float, float]) -> None:
    from posthoc_cli.snapshots.prune import file_bytes

    if pruning.to_delete:
        rows = [
            [s.path.name, f"{s.info.t:,.12g}", f"{s.info.sigma_rel:g}", resources.size_text(s.nbytes)]
            for s in sorted(pruning.to_delete, key=lambda snapshot: (snapshot.info.t, snapshot.info.sigma_rel))
        ]
        output.print_table(["to delete", "t", "sigma_rel", "size"], rows, left=["to delete"])
        output.print_line()
    table = []
    for when, group, errors in (
        ("now", (*pruning.kept, *pruning.to_delete), pruning.before),
        ("afterwards", pruning.kept, pruning.after),
    ):
        numbers = map(percent, (errors.worst, errors.median))
        table.append([when, str(len(group)), resources.size_text(file_bytes(group)), *numbers])
    output.print_table(["", "snapshots", "size", "worst error", "median error"], table, left=[""])
    low, high = sigma_range
    how = {"assumed": ", if the network moves evenly", "sampled": ", from a sample of the weights"}
    output.print_line(f"predicted errors for sigma_rel {low:g} to {high:g}{how.get(pruning.source, '')}")
