"""`ema plan`: which averages to track and store, chosen before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posthoc_cli import files, resources
from posthoc_cli.cli import output, values
from posthoc_cli.errors import percent
from posthoc_cli.targets import parse_numbers

if TYPE_CHECKING:
    from posthoc_cli.planning import PlanReport

EPILOG = (
    "Example:  ema plan --steps 400000 --params 1.2e9 --max-size 60GB --sigma-range 0.03:0.28   or   "
    "ema plan --steps 400000 --params 1.2B --max-size 60GB --like run/ema --out plan.png"
)

_SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def plan(
    steps: str = values.RUN(..., metavar="COUNT", help="Steps of training (calls of update_): 400000, 4e5, 400K."),
    params: str = values.RUN(
        ..., metavar="COUNT", help="Parameters of the network that are averaged: 1.2e9, 1.2B, 350M."
    ),
    max_size: str = values.RUN(..., metavar="SIZE", help="The most disk space for all snapshots: 60GB, 500MiB."),
    like: Path | None = values.LIKE,
    sigma_range: str = values.SIGMA_RANGE,
    max_error: str = values.TARGETS(
        "0.05%", metavar="ERROR", help="The largest accepted predicted error; the cheapest schedule within it is best."
    ),
    sigma_rels: str | None = values.HOW(None, show_default="the best", help="Track these widths, such as 0.05,0.28."),
    dtype: str | None = values.HOW(None, show_default="the best", help="float16, bfloat16 or float32."),
    checkpoint_every: str | None = values.HOW(
        None, metavar="COUNT", show_default="the best", help="Steps between snapshots."
    ),
    max_checkpoints: str | None = values.HOW(
        None, metavar="COUNT", show_default="the best, up to 64", help="Snapshots per profile."
    ),
    out: Path | None = values.PICTURE,
    overwrite: bool = values.OVERWRITE,
    as_json: bool = values.JSON,
) -> None:
    """Propose what to track and store before training.

    Finds the schedule with the fewest writes and updates whose worst predicted error in the range is at most
    --max-error, or the one with the smallest error if the disk space is too small for that. Also shows alternatives
    (the best of each dtype, and of one, two and three profiles), with the snapshots kept of each profile and the steps
    between them, and prints the call to paste.

    Errors assume that the network moves evenly, as a random walk that covers a quarter of the norm of its weights
    during training. --like uses the motion of an earlier run instead, stretched over --steps, and the rounding of
    its stored averages. The disk space is that of all averages while the last ones are written: one more of each
    profile than is kept. Headers and buffers are not counted.
    """
    from posthoc_cli.planning import Task
    from posthoc_cli.run import plan_training

    widths = None if sigma_rels is None else tuple(parse_numbers(sigma_rels, "--sigma-rels"))
    task = Task(
        steps=values.parse_count(steps, "--steps"),
        params=values.parse_count(params, "--params", "1.2e9, 1.2B or 350M"),
        max_size=resources.parse_bytes(max_size, "--max-size"),
        sigma_range=values.parse_sigma_range(sigma_range),
        max_error=values.parse_max_error(max_error),
        sigma_rels=None if widths is None else tuple(sorted(widths)),
        dtype=None if dtype is None else _SHORT.get(dtype, dtype),
        checkpoint_every=values.optional(values.parse_count, checkpoint_every, "--checkpoint-every"),
        max_checkpoints=values.optional(values.parse_count, max_checkpoints, "--max-checkpoints", "20"),
    )
    earlier = None if like is None else values.open_run(like)
    with output.status_bar() as watch:
        watch("looking for the best schedules", 0, None)
        report = plan_training(task, earlier, out, overwrite)
    output.print_report(report, as_json, _print, out)


def _print(report: PlanReport, out: Path | None) -> None:
    columns = ["tracked", "dtype", "kept", "every", "disk", "worst error", "median error"]
    rows = []
    for proposal in report.proposals:
        schedule, errors = proposal.schedule, proposal.errors
        tracked = ", ".join(f"{s:g}" for s in schedule.sigma_rels)
        kept = tracked, proposal.dtype, str(schedule.kept), f"{schedule.checkpoint_every:,}"
        rows.append([*kept, resources.size_text(proposal.nbytes), *map(percent, (errors.worst, errors.median))])
    output.print_table(columns, rows, left=["tracked", "dtype"])
    low, high = report.task.sigma_range
    output.print_line(f"predicted errors for sigma_rel {low:g} to {high:g} at the end, if {report.assumption}")
    best = report.proposals[0]
    if best.last_step < report.task.steps:
        output.print_line(f"the best schedule's last snapshot is at step {best.last_step:,} of {report.task.steps:,}")
    output.print_line()
    for line in best.call().splitlines():
        output.print_line(line)
    if out is not None:
        output.print_line()
        output.print_line(f"wrote {files.expanded(out)}")
