"""`ema prune`: delete the snapshots that matter least."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from posthoc_cli import resources
from posthoc_cli.cli import options, output
from posthoc_cli.errors import InvalidValueError, check_alone

if TYPE_CHECKING:
    from posthoc_cli.snapshots.prune import Pruning

EPILOG = "Example:  ema prune run/ema --keep 20 --dry-run   or   ema prune run/ema --max-error 1e-3 --yes"


def prune(
    directory: str = options.DIRECTORY,
    keep: str | None = options.HOW(None, metavar="COUNT", help="Keep this number of snapshots of each profile."),
    max_size: str | None = options.HOW(None, metavar="SIZE", help="Or keep as many as fit: 10GB, 500MiB."),
    max_error: str | None = options.HOW(
        None, metavar="ERROR", help="Or keep as few as hold the worst predicted error in the range to this: 1e-3."
    ),
    yes: bool = options.HOW(False, "--yes", "-y", help="Do not ask."),
    dry_run: bool = options.HOW(False, "--dry-run", help="Show what would be deleted; delete nothing."),
    sigma_range: str = options.SIGMA_RANGE,
    as_json: bool = options.JSON,
) -> None:
    """Delete the snapshots that matter least.

    Shows which snapshots would be deleted and the predicted error over the range without them, then asks. The newest
    snapshot of each profile is kept. Deletes only after every remaining snapshot was read and verified, and never while
    a tracker writes to the directory; an interruption leaves a valid directory.
    """
    from posthoc_cli.run import Run

    check_alone(1, keep=keep, max_size=max_size, max_error=max_error)
    count = options.optional(options.parse_count, keep, "--keep", "20")
    error = options.optional(options.parse_max_error, max_error)
    ends = options.parse_sigma_range(sigma_range)
    run = Run(options.existing(directory, directory=True))
    alternative = "; --dry-run shows what would be deleted"
    if as_json and not (yes or dry_run):
        raise InvalidValueError("--json", "cannot ask before files are changed", f"add --yes{alternative}")
    if not (yes or dry_run or sys.stdin.isatty()):
        raise InvalidValueError("--yes", f"is needed without a terminal{alternative}")

    def agree(planned: Pruning) -> bool:
        if not as_json:
            _print(planned.to_dict(), ends)
        return yes or typer.confirm(f"delete {output.counted(len(planned.to_delete), 'snapshot')} for good?", err=True)

    pruning = run.prune(
        keep=count, max_size=max_size, max_error=error, sigma_range=ends, dry_run=dry_run, agree=agree,
        progress=output.progress_bar(),
    )  # fmt: skip
    done = pruning.to_dict()
    if as_json:
        output.print_json(done)
    else:
        if dry_run or not done["gone"]:
            _print(done, ends)
        _print_end(done, dry_run)
    if done["gone"] and not (done["deleted"] or dry_run):
        raise typer.Exit(1)


def _print(found: dict[str, Any], sigma_range: tuple[float, float]) -> None:
    gone, kept = found["gone"], found["kept"]
    if gone:
        rows = sorted(gone, key=lambda one: (one["t"], one["sigma_rel"]))
        output.print_rows(rows, ["to delete:file", "t", "sigma_rel", "size:bytes"])
        output.print_line()
    both = {"when": "now", "count": len(kept) + len(gone), "bytes": found["bytes"] + found["gone_bytes"]}
    left = {"when": "afterwards", "count": len(kept), "bytes": found["bytes"]}
    columns = [":when", "snapshots:count", "size:bytes", "worst_error", "median_error"]
    output.print_rows([both | found["before"], left | found["after"]], columns)
    low, high = sigma_range
    how = {"assumed": ", if the network moves evenly", "sampled": ", from a sample of the weights"}
    output.print_line(f"predicted errors for sigma_rel {low:g} to {high:g}{how.get(found['prior'], '')}")


def _print_end(found: dict[str, Any], dry_run: bool) -> None:
    what = f"{output.counted(len(found['gone']), 'snapshot')}, {resources.size_text(found['gone_bytes'])}"
    if not found["gone"]:
        output.print_line("nothing has to be deleted")
    elif found["deleted"]:
        output.print_line(f"deleted {what}; {len(found['kept'])} are left, verified")
    else:
        output.print_line(f"would delete {what}; " * dry_run + "nothing was deleted")
