"""`ema prune`: fewer snapshots, those that are missed least."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posthoc_cli import files
from posthoc_cli.cli import output
from posthoc_cli.cli.values import (
    JsonOption,
    SigmaRangeOption,
    YesOption,
    existing_directory,
    optional,
    parse_count,
    parse_max_error,
    parse_sigma_range,
)
from posthoc_cli.errors import InvalidValueError

if TYPE_CHECKING:
    from posthoc_cli.snapshots.pruning import Pruning

EPILOG = "Example:  ema prune run/ema --keep 20 --dry-run   or   ema prune run/ema --max-error 1e-3 --yes"


def prune(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory that the tracker wrote.")],
    keep: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Keep this number of snapshots of each profile; or")
    ] = None,
    max_size: Annotated[str | None, typer.Option(metavar="SIZE", help="as many as fit: 10GB, 500MiB; or")] = None,
    max_error: Annotated[
        str | None, typer.Option(help="as few as keep the worst predicted error in the range at or below this: 1e-3.")
    ] = None,
    sigma_range: SigmaRangeOption = "0.05:0.28",
    yes: YesOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted; delete nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the snapshots that are missed least.

    Shows which snapshots would be deleted and the predicted error over the range without them, then asks. The newest
    snapshot of each profile stays. Deletes only after every remaining snapshot was read and verified, and never while a
    tracker writes to the directory; an interruption leaves a valid directory.
    """
    from posthoc_cli.run import Run

    if [keep, max_size, max_error].count(None) != 2:
        raise InvalidValueError("--keep, --max-size and --max-error", "give one of them")
    count = optional(parse_count, keep, "--keep", "20; the newest snapshot of each profile stays")
    max_bytes = optional(files.parse_bytes, max_size, "--max-size")
    error = optional(parse_max_error, max_error)
    wanted = parse_sigma_range(sigma_range)
    directory = existing_directory(directory)
    if as_json and not (yes or dry_run):
        raise InvalidValueError("--json", "shows what is deleted only afterwards", "add --yes or --dry-run")
    if not (yes or dry_run or sys.stdin.isatty()):
        raise InvalidValueError("--yes", "is needed without a terminal; --dry-run shows what would be deleted")

    def agree(planned: Pruning) -> bool:
        if not as_json:
            _print(planned, wanted)
        return yes or typer.confirm(f"delete {output.counted(len(planned.gone), 'snapshot')} for good?", err=True)

    pruning = Run(directory).prune(
        keep=count, max_bytes=max_bytes, max_error=error, sigma_range=wanted, dry_run=dry_run, agree=agree,
        progress=output.progress_bar(),
    )  # fmt: skip
    if as_json:
        output.print_json(pruning.to_dict())
    else:
        _print(pruning, wanted) if dry_run or not pruning.gone else None
        _print_end(pruning, dry_run)
    if pruning.gone and not (pruning.deleted or dry_run):
        raise typer.Exit(1)


COMMAND = prune

# --- what is printed -------------------------------------------------------------------------------


def _print(pruning: Pruning, sigma_range: tuple[float, float]) -> None:
    from posthoc_cli.snapshots.pruning import file_bytes

    if pruning.gone:
        rows = [
            [s.path.name, f"{s.info.t:,.12g}", f"{s.info.sigma_rel:g}", output.size_text(s.header.file_bytes)]
            for s in sorted(pruning.gone, key=lambda snapshot: (snapshot.info.t, snapshot.info.sigma_rel))
        ]
        output.print_table(["would go", "t", "sigma_rel", "size"], rows, left=["would go"])
        output.print_line("")
    states = [("now", (*pruning.kept, *pruning.gone), pruning.before), ("then", pruning.kept, pruning.after)]
    table = [
        [when, str(len(group)), output.size_text(file_bytes(group)), *map(output.percent, (e.worst, e.median))]
        for when, group, e in states
    ]
    output.print_table(["", "snapshots", "size", "worst error", "median error"], table, left=[""])
    low, high = sigma_range
    how = {"assumed": ", if the network moves evenly", "sampled": ", from a sample of the weights"}
    output.print_line(f"predicted errors for sigma_rel {low:g} to {high:g}{how.get(pruning.source, '')}")


def _print_end(pruning: Pruning, dry_run: bool) -> None:
    from posthoc_cli.snapshots.pruning import file_bytes

    what = f"{output.counted(len(pruning.gone), 'snapshot')}, {output.size_text(file_bytes(pruning.gone))}"
    if not pruning.gone:
        output.print_line("nothing has to be deleted")
    elif pruning.deleted:
        output.print_line(f"deleted {what}; {len(pruning.kept)} are left, verified")
    elif dry_run:
        output.print_line(f"would delete {what}; nothing was deleted")
    else:
        output.print_line("nothing was deleted")
