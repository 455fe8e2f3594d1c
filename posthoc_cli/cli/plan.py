"""`ema plan`: which averages to track and store, chosen before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posthoc_cli import resources
from posthoc_cli.cli import output, values
from posthoc_cli.errors import percent

if TYPE_CHECKING:
    from posthoc_cli.planning import PlanReport

EPILOG = (
    "Example:  ema plan --steps 400000 --params 1.2e9 --disk 60GB   or   "
    "ema plan --steps 400000 --params 1.2B --disk 60GB --like run/ema --out plan.png"
)


def plan(
    steps: str = values.RUN(..., metavar="COUNT", help="Steps of training (calls of update_): 400000, 4e5, 400K."),
    params: str = values.RUN(
        ..., metavar="COUNT", help="Parameters of the network that are averaged: 1.2e9, 1.2B, 350M."
    ),
    disk: str | None = values.RUN(
        None, metavar="SIZE", help="The most disk space for all snapshots: marks the most exact schedule within it."
    ),
    like: Path | None = values.LIKE,
    sigma_range: str = values.SIGMA_RANGE,
    out: Path | None = values.PICTURE,
    overwrite: bool = values.OVERWRITE,
    as_json: bool = values.JSON,
) -> None:
    """Show what to track and store, before training.

    Lists five schedules with their size on disk and their predicted error over --sigma-range, and the line of code for
    each. They track the ends of the range, and keep 8 to 20 snapshots of each profile.

    Errors assume that the network moves evenly, as a random walk that covers a quarter of the norm of its weights
    during training. --like uses the motion of an earlier run instead, stretched over --steps, and the rounding of
    its stored averages. The disk space is that of all averages while the last ones are written: one more of each
    profile than is kept. Headers and buffers are not counted.
    """
    from posthoc_cli.run import plan_training

    picture = values.new_picture(out, overwrite)
    report = plan_training(
        values.parse_count(steps, "--steps"),
        values.parse_count(params, "--params", "1.2e9, 1.2B or 350M"),
        values.optional(resources.parse_bytes, disk, "--disk"),
        sigma_range=values.parse_sigma_range(sigma_range),
        like=None if like is None else values.open_run(like),
    )
    if picture is not None:
        from posthoc_cli import plots

        output.write_picture(lambda: plots.error_figure([each.errors for each in report.proposals]), picture, overwrite)
    output.print_report(report, as_json, _print, picture)


def _print(report: PlanReport, picture: Path | None) -> None:
    chosen = report.within_disk
    columns = ["", "tracked", "dtype", "kept", "every", "disk", "worst error", "median error"]
    rows = []
    for proposal in report.proposals:
        schedule, errors = proposal.schedule, proposal.errors
        name = f"{proposal.name}{' *' * (proposal is chosen)}"
        tracked = ", ".join(f"{s:g}" for s in schedule.sigma_rels)
        kept = tracked, proposal.dtype, str(schedule.kept), f"{schedule.checkpoint_every:,}"
        rows.append([name, *kept, resources.size_text(proposal.nbytes), *map(percent, (errors.worst, errors.median))])
    output.print_table(columns, rows, left=["", "tracked", "dtype"])
    low, high = report.proposals[0].errors.sigma_rels[[0, -1]]
    output.print_line(f"predicted errors for sigma_rel {low:g} to {high:g} at the end, if {report.assumption}")
    if report.disk is not None:
        output.print_line("* the most exact within --disk" if chosen else "none is within --disk")
    for proposal in report.proposals:
        output.print_line()
        output.print_line(f"{proposal.name}:")
        output.print_line(f"ema = {proposal.call()}")
    if picture is not None:
        output.print_line()
        output.print_line(f"wrote {picture}")
