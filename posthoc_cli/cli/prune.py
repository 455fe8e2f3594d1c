"""`ema prune`: fewer snapshots, those that are missed least."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posthoc_cli.cli import output
from posthoc_cli.cli.values import existing_directory, parse_bytes, parse_count, parse_max_error, parse_sigma_range
from posthoc_cli.errors import InvalidValueError

if TYPE_CHECKING:
    from posthoc_cli.snapshots.pruning import Pruning

EPILOG = "Example:  ema prune run/ema --keep 20 --dry-run   or   ema prune run/ema --max-error 1e-3 --yes"


def prune(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory that the tracker wrote.")],
    keep: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Leave so many snapshots of each profile; or")
    ] = None,
    max_size: Annotated[str | None, typer.Option(metavar="SIZE", help="as many as fit: 10GB, 500MiB; or")] = None,
    max_error: Annotated[
        str | None, typer.Option(help="as few as keep the worst predicted error in the range at most that: 1e-3.")
    ] = None,
    sigma_range: Annotated[str, typer.Option(help="The averages that are wanted: LOW:HIGH.")] = "0.05:0.28",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; delete nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Delete the snapshots that are missed least.

    Shows what would go and what the predicted error over the range becomes, then asks. The newest snapshot of
    each profile stays. Deletes only after every snapshot that stays was read and verified, and never while a
    tracker writes to the directory; an interruption leaves a directory that works.
    """
    from posthoc_cli.snapshots.directory import read_directory
    from posthoc_cli.snapshots.pruning import plan_pruning
    from posthoc_cli.snapshots.pruning import prune as delete

    output.log_to_stderr(False)
    if [keep, max_size, max_error].count(None) != 2:
        raise InvalidValueError("--keep, --max-size and --max-error", "give one of them")
    count = None if keep is None else parse_count(keep, "--keep", "20; the newest snapshot of each profile stays")
    max_bytes = None if max_size is None else parse_bytes(max_size, "--max-size")
    error = None if max_error is None else parse_max_error(max_error)
    wanted = parse_sigma_range(sigma_range)
    directory = existing_directory(directory)
    if as_json and not (yes or dry_run):
        raise InvalidValueError("--json", "shows what would go only afterwards", "give --yes or --dry-run with it")
    if not (yes or dry_run or sys.stdin.isatty()):
        raise InvalidValueError("--yes", "is needed where nobody can be asked; --dry-run shows what would go")
    pruning = plan_pruning(read_directory(directory), count, max_bytes, error, wanted)
    if not as_json:
        _print(pruning, wanted)
    # Asked without the lock: a question that nobody answers must not stop a training.
    agreed = bool(pruning.gone) and not dry_run and (yes or _confirmed(pruning))
    if agreed:
        with output.progress_bar("verifying what stays", pruning.read_bytes, False) as progress:
            pruning = delete(directory, pruning, progress)
    if as_json:
        output.print_json(pruning.to_dict())
    else:
        _print_end(pruning, dry_run)
    if pruning.gone and not (agreed or dry_run):
        raise typer.Exit(1)


def _confirmed(pruning: Pruning) -> bool:
    """What the user answers, on stderr so that --json stays whole."""
    return typer.confirm(f"delete {_counted(len(pruning.gone))} for good?", err=True)


# --- what is printed -------------------------------------------------------------------------------


def _counted(count: int) -> str:
    return f"{count} snapshot{'s' * (count != 1)}"


def _print(pruning: Pruning, sigma_range: tuple[float, float]) -> None:
    from posthoc_cli.snapshots.pruning import file_bytes

    if pruning.gone:
        rows = [
            [
                snapshot.path.name,
                f"{snapshot.info.t:,.12g}",
                f"{snapshot.info.sigma_rel:g}",
                output.size_text(snapshot.header.file_bytes),
            ]
            for snapshot in sorted(pruning.gone, key=lambda snapshot: (snapshot.info.t, snapshot.info.sigma_rel))
        ]
        output.print_table(["would go", "t", "sigma_rel", "size"], rows, left=["would go"])
        output.print_line("")
    states = [("now", (*pruning.kept, *pruning.gone), pruning.before), ("then", pruning.kept, pruning.after)]
    table = [
        [
            when,
            str(len(snapshots)),
            output.size_text(file_bytes(snapshots)),
            output.percent(errors.worst),
            output.percent(errors.median),
        ]
        for when, snapshots, errors in states
    ]
    output.print_table(["", "snapshots", "size", "worst error", "median error"], table, left=[""])
    low, high = sigma_range
    how = {"assumed": ", if the network moves evenly", "sampled": ", from a sample of the weights"}
    output.print_line(f"predicted errors for sigma_rel {low:g} to {high:g}{how.get(pruning.source, '')}")


def _print_end(pruning: Pruning, dry_run: bool) -> None:
    from posthoc_cli.snapshots.pruning import file_bytes

    freed = output.size_text(file_bytes(pruning.gone))
    if not pruning.gone:
        output.print_line("nothing has to go; nothing was deleted")
    elif pruning.deleted:
        output.print_line(f"deleted {_counted(len(pruning.gone))}, {freed}; {len(pruning.kept)} are left, verified")
    elif dry_run:
        output.print_line(f"would delete {_counted(len(pruning.gone))}, {freed}; nothing was deleted")
    else:
        output.print_line("nothing was deleted")


COMMAND = prune
