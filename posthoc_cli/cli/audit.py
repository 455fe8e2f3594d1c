"""`ema audit`: which decay an average really has, compared with the decay that it claims."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import typer
from typer import Argument

from posthoc_cli.cli import options, output

EPILOG = "Example:  ema audit checkpoints --claimed 0.9999 --out audit.png"


def audit(
    directory: str = Argument(..., metavar="DIR", help="Checkpoints with an average and the weights, or snapshots."),
    claimed: float | None = options.RUN(
        None, metavar="DECAY", show_default="from the files or the import", help="The decay that it should have."
    ),
    out: Path | None = options.PICTURE,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
) -> None:
    """Find which decay an average really has.

    Compares averages with the weights in the same checkpoints, from one to the next, on a sample of a million elements.
    Shows the decay of each interval, and what is wrong: a wrong sign, an update per microbatch, an average that does
    not move or that was restarted at a resume. For a tracker's snapshots it shows the sigma_rel.

    Exit code 1 if an average is not what it claims to be.
    """
    picture = options.new_picture(out, overwrite)
    audits = options.open_run(directory, directory=False).audit(claimed)
    if not audits[0].intervals:
        picture = None  # there is nothing to draw
    if picture is not None:
        from posthoc_cli import plots

        output.write_picture(lambda: plots.audit_figure(audits[0].to_dict()), picture, overwrite)
    if as_json:
        output.print_json({"audits": [audit.to_dict() for audit in audits]})
    else:
        for audit in audits:
            _print(audit.to_dict())
        if picture is not None:
            output.print_line(f"wrote {picture}")
    if any(audit.is_bad for audit in audits):
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    name, intervals = found["name"], found["intervals"]
    of = f" of {name}" * bool(name)
    is_decay = found["what"] == "decay"
    rows = [
        {
            "found": "-" if math.isnan(one["found"]) else f"{one['found']:,.4g}",
            "claimed": "" if one["claimed"] is None else f"{one['claimed']:,.4g}",
            "ratio": "" if one["claimed"] is None else f"{one['found'] / one['claimed']:.3g}",
        }
        | {key: one[key] for key in ("begin", "end", "unexplained", "note")}
        for one in intervals
    ]
    claim = [] if found["claimed"] is None else ["claimed", "ratio"]
    if rows:
        output.print_line(f"time constant{of}, in steps, by interval" if is_decay else f"sigma_rel found{of}")
        output.print_rows(rows, ["from:begin", "to:end", "found", *claim, "unexplained", "note"])
        output.print_line()
    verdict = "" if found["text"].endswith(found["verdict"]) else f"{found['verdict']}: "
    output.print_line(f"{name}: " * bool(name) + f"{verdict}{found['text']}")
