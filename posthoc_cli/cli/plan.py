"""`ema plan`: show what to track and store, before training."""

from __future__ import annotations

from typing import Any

from posthoc_cli import resources
from posthoc_cli.cli import options, output

_PLAN_COLUMNS = [
    ":marked",
    "tracked",
    "dtype",
    "kept:snapshots_each",
    "every:checkpoint_every",
    "disk:bytes",
]


def plan(
    steps: str = options.RUN(
        ..., metavar="COUNT", help="Steps of training (calls of update_): 400000, 4e5, 400K."
    ),
    params: str = options.RUN(
        ..., metavar="COUNT", help="Averaged parameters of the network: 1.2e9, 1.2B, 350M."
    ),
    disk: str | None = options.RUN(
        None, metavar="SIZE", help="Mark the most exact schedule within this disk space."
    ),
    sigma_range: str = options.SIGMA_RANGE,
    out: str | None = options.PICTURE,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
) -> None:
    """Show what to track and store, before training.

    Lists five schedules with their size on disk and their predicted error over --sigma-range, and
    the line of code for each. They track the ends of the range, and keep 8 to 20 snapshots of each
    profile.

    Errors assume that the network moves evenly, as a random walk that covers a quarter of the norm
    of its weights during training. The disk space is that of all averages while the last ones are
    written: one more of each profile than is kept. Headers and buffers are not counted.
    """
    from posthoc_cli.run import plan_training

    picture = options.new_picture(out, overwrite)
    report = plan_training(
        options.parse_count(steps, "--steps"),
        options.parse_count(params, "--params", "1.2e9, 1.2B or 350M"),
        options.optional(resources.parse_bytes, disk, "--disk"),
        sigma_range=options.parse_sigma_range(sigma_range),
    )
    if picture is not None:
        from posthoc_cli import plots

        output.write_picture(
            lambda: plots.error_figure([each.errors for each in report.proposals]),
            picture,
            overwrite,
        )
    output.show(report.to_dict(), as_json, _print_plan, picture)


def _print_plan(report: dict[str, Any]) -> None:
    schedules = report["schedules"]
    chosen = report["within_disk"]
    rows = []
    for schedule in schedules:
        name = schedule["name"]
        tracked = ", ".join(map(str, schedule["sigma_rels"]))
        marked = f"{name} *" if name == chosen else name
        rows.append(schedule | {"marked": marked, "tracked": tracked})
    output.print_rows(rows, [*_PLAN_COLUMNS, "worst_error", "median_error"])
    low = schedules[0]["sigma_rel"][0]
    high = schedules[0]["sigma_rel"][-1]
    output.print_line(
        f"predicted errors for sigma_rel {low:g} to {high:g} at the end, if {report['assumption']}"
    )
    if report["disk"] is not None:
        output.print_line("* the most exact within --disk" if chosen else "none is within --disk")
    for schedule in schedules:
        output.print_line()
        output.print_line(f"{schedule['name']}:")
        output.print_line(f"ema = {schedule['call']}")
