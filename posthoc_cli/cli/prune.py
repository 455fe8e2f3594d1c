"""`ema prune`: delete the snapshots that matter least."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from posthoc_cli import resources
from posthoc_cli.cli import options, output
from posthoc_cli.errors import InvalidValueError, at_most_one, count_noun

if TYPE_CHECKING:
    from posthoc_cli.snapshots.prune import Pruning


def prune(
    directory: str = options.DIRECTORY,
    keep: str = options.HOW(
        ..., metavar="COUNT", help="Keep the snapshots of this number of times."
    ),
    yes: bool = options.HOW(False, "--yes", "-y", help="Do not ask."),
    dry_run: bool = options.HOW(
        False, "--dry-run", help="Show what would be deleted; delete nothing."
    ),
    sigma_range: str = options.SIGMA_RANGE,
    as_json: bool = options.JSON,
) -> int:
    """Delete the snapshots that matter least.

    Shows which snapshots would be deleted and the predicted error over the range without them, then
    asks. All snapshots of a time are deleted, or none; the newest of each profile are kept. Deletes
    only after every remaining snapshot was read and verified, and never while a tracker writes to
    the directory; an interruption leaves a valid directory.
    """
    at_most_one(yes=yes, dry_run=dry_run)
    count = options.parse_count(keep, "--keep")
    can_ask = sys.stdin.isatty() and not as_json
    ends = options.parse_sigma_range(sigma_range)
    run = options.open_run(directory)

    def agree(planned: Pruning) -> bool:
        if not (yes or can_ask):
            reason = "is required with --json or without a terminal"
            raise InvalidValueError("--yes", reason, "--dry-run shows what would be deleted")
        if not as_json:
            _print_prune(planned.to_dict(), ends)
        what = count_noun(len(planned.to_delete), "snapshot")
        return yes or typer.confirm(f"delete {what} for good?", err=True)

    pruning = run.prune(
        keep=count,
        sigma_range=ends,
        dry_run=dry_run,
        agree=agree,
        progress=output.progress_bar(),
    )
    report = pruning.to_dict()
    if as_json:
        output.print_json(report)
    else:
        if dry_run or not report["gone"]:
            _print_prune(report, ends)
        _print_end(report, dry_run)
    return int(bool(report["gone"]) and not (report["deleted"] or dry_run))


def _print_prune(
    report: dict[str, Any],
    sigma_range: tuple[float, float],
) -> None:
    gone = report["gone"]
    kept = report["kept"]
    if gone:
        rows = sorted(gone, key=lambda snapshot: (snapshot["t"], snapshot["sigma_rel"]))
        output.print_rows(rows, ["to delete:file", "t", "sigma_rel", "size:bytes"])
        output.print_line()
    all_snapshots = {
        "when": "now",
        "count": len(kept) + len(gone),
        "bytes": report["bytes"] + report["gone_bytes"],
    }
    remaining = {"when": "afterwards", "count": len(kept), "bytes": report["bytes"]}
    columns = [":when", "snapshots:count", "size:bytes", "worst_error", "median_error"]
    output.print_rows([all_snapshots | report["before"], remaining | report["after"]], columns)
    low, high = sigma_range
    assumptions = {
        "assumed": ", if the network moves evenly",
        "sampled": ", from a sample of the weights",
    }
    basis = assumptions.get(report["prior"], "")
    output.print_line(f"predicted errors for sigma_rel {low:g} to {high:g}{basis}")


def _print_end(report: dict[str, Any], dry_run: bool) -> None:
    count = count_noun(len(report["gone"]), "snapshot")
    what = f"{count}, {resources.format_bytes(report['gone_bytes'])}"
    if not report["gone"]:
        output.print_line("nothing has to be deleted")
    elif report["deleted"]:
        output.print_line(f"deleted {what}; {len(report['kept'])} are left, verified")
    elif dry_run:
        output.print_line(f"would delete {what}; nothing was deleted")
    else:
        output.print_line("nothing was deleted")
