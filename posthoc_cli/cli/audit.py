"""`ema audit`: which decay an average really has, compared with the decay that it claims."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer import Argument

from posthoc_cli.cli import output, values
from posthoc_cli.errors import percent

if TYPE_CHECKING:
    from posthoc_cli.checkpoints.audit import Audit

EPILOG = "Example:  ema audit checkpoints --claimed 0.9999 --out audit.png"


def audit(
    directory: Path = Argument(..., metavar="DIR", help="Checkpoints with an average and the weights, or snapshots."),
    claimed: float | None = values.RUN(
        None, metavar="DECAY", show_default="from the files or the import", help="The decay that it should have."
    ),
    out: Path | None = values.PICTURE,
    overwrite: bool = values.OVERWRITE,
    as_json: bool = values.JSON,
) -> None:
    """Find which decay an average really has.

    Compares averages with the weights in the same checkpoints, from one to the next, on a sample of a million elements.
    Shows the decay of each interval, and what is wrong: a wrong sign, an update per microbatch, an average that does
    not move or that was restarted at a resume. For a tracker's snapshots it shows the sigma_rel.

    Exit code 1 if an average is not what it claims to be.
    """
    picture = values.new_picture(out, overwrite)
    audits = values.open_run(directory, directory=False).audit(claimed)
    if not audits[0].intervals:
        picture = None  # there is nothing to draw
    if picture is not None:
        from posthoc_cli import plots

        output.write_picture(lambda: plots.audit_figure(audits[0].to_dict()), picture, overwrite)
    if as_json:
        output.print_json({"audits": [audit.to_dict() for audit in audits]})
    else:
        for audit in audits:
            _print(audit)
        if picture is not None:
            output.print_line(f"wrote {picture}")
    if any(audit.is_bad for audit in audits):
        raise typer.Exit(1)


def _print(audit: Audit) -> None:
    is_decay = audit.what == "decay"
    columns = ["from", "to", "found", *["claimed", "ratio"] * (audit.claimed is not None), "unexplained", "note"]
    rows = []
    for interval in audit.intervals:
        times = [f"{t:,.12g}" for t in (interval.begin, interval.end)]
        found, claimed = interval.found, interval.claimed
        claim = [] if claimed is None else [f"{claimed:,.4g}", f"{found / claimed:.3g}"]
        measured = "-" if math.isnan(found) else f"{found:,.4g}"
        rows.append([*times, measured, *claim, percent(interval.unexplained), interval.note])
    if rows:
        of = f" of {audit.name}" * bool(audit.name)
        output.print_line(f"time constant{of}, in steps, by interval" if is_decay else f"sigma_rel found{of}")
        output.print_table(columns, rows, left=["note"])
        output.print_line()
    verdict = "" if audit.text.endswith(audit.verdict) else f"{audit.verdict}: "
    output.print_line(f"{audit.name}: " * bool(audit.name) + f"{verdict}{audit.text}")
