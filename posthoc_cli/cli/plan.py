"""`ema plan`: which averages to track and store, chosen before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posthoc_cli import resources
from posthoc_cli.cli import options, output

EPILOG = (
    "Example:  ema plan --steps 400000 --params 1.2e9 --disk 60GB   or   "
    "ema plan --steps 400000 --params 1.2B --disk 60GB --like run/ema --out plan.png"
)
_COLUMNS = [":marked", "tracked", "dtype", "kept:snapshots_each", "every:checkpoint_every", "disk:bytes"]


def plan(
    steps: str = options.RUN(..., metavar="COUNT", help="Steps of training (calls of update_): 400000, 4e5, 400K."),
    params: str = options.RUN(
        ..., metavar="COUNT", help="Parameters of the network that are averaged: 1.2e9, 1.2B, 350M."
    ),
    disk: str | None = options.RUN(
        None, metavar="SIZE", help="The most disk space for all snapshots: marks the most exact schedule within it."
    ),
    like: str | None = options.LIKE,
    sigma_range: str = options.SIGMA_RANGE,
    out: Path | None = options.PICTURE,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
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

    picture = options.new_picture(out, overwrite)
    report = plan_training(
        options.parse_count(steps, "--steps"),
        options.parse_count(params, "--params", "1.2e9, 1.2B or 350M"),
        options.optional(resources.parse_bytes, disk, "--disk"),
        sigma_range=options.parse_sigma_range(sigma_range),
        like=options.optional(options.open_run, like),
    )
    if picture is not None:
        from posthoc_cli import plots

        output.write_picture(lambda: plots.error_figure([each.errors for each in report.proposals]), picture, overwrite)
    output.show(report.to_dict(), as_json, _print)
    if picture is not None and not as_json:
        output.print_line()
        output.print_line(f"wrote {picture}")


def _print(found: dict[str, Any]) -> None:
    schedules, chosen = found["schedules"], found["within_disk"]
    rows = [
        one
        | {"marked": one["name"] + " *" * (one["name"] == chosen), "tracked": ", ".join(map(str, one["sigma_rels"]))}
        for one in schedules
    ]
    output.print_rows(rows, [*_COLUMNS, "worst_error", "median_error"])
    low, high = schedules[0]["sigma_rel"][0], schedules[0]["sigma_rel"][-1]
    output.print_line(f"predicted errors for sigma_rel {low:g} to {high:g} at the end, if {found['assumption']}")
    if found["disk"] is not None:
        output.print_line("* the most exact within --disk" if chosen else "none is within --disk")
    for one in schedules:
        output.print_line()
        output.print_line(f"{one['name']}:")
        output.print_line(f"ema = {one['call']}")
