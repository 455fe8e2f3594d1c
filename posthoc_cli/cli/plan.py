"""`ema plan`: what to track and store, before training, for the averages that will be wanted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli import files
from posthoc_cli.cli import output
from posthoc_cli.cli.error_plot import PICTURES
from posthoc_cli.cli.output import DTYPES, LikeOption, assumption_text, read_likeness
from posthoc_cli.cli.values import (
    check_output,
    one_of,
    parse_bytes,
    parse_count,
    parse_max_error,
    parse_sigma_range,
    parse_sigma_rels,
)
from posthoc_cli.errors import InvalidValueError

if TYPE_CHECKING:
    from posthoc_cli.planning import Proposal, Task
    from posthoc_cli.snapshots.measurements import Likeness

EPILOG = (
    "Example:  ema plan --steps 400000 --params 1.2e9 --max-size 60GB --sigma-range 0.03:0.28   or   "
    "ema plan --steps 400000 --params 1.2B --max-size 60GB --like run/ema --out plan.png"
)


def plan(
    steps: Annotated[
        str, typer.Option(metavar="COUNT", help="Length of training, in steps (calls of update_): 400000, 4e5, 400K.")
    ],
    params: Annotated[
        str,
        typer.Option(metavar="COUNT", help="Parameters of the network that are averaged: 1.2e9, 1.2B, 350M."),
    ],
    max_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Disk for all snapshots at their fullest: 60GB, 500MiB.")
    ],
    sigma_range: Annotated[str, typer.Option(help="The averages that will be wanted: LOW:HIGH.")] = "0.05:0.28",
    max_error: Annotated[
        str,
        typer.Option(
            metavar="ERROR", help="A worst predicted error that is good enough: of schedules below it, the cheapest."
        ),
    ] = "0.05%",
    like: LikeOption = None,
    sigma_rels: Annotated[
        str | None, typer.Option(help="Track these widths, such as 0.05,0.28. [default: the best]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of(*DTYPES.values()),
            help="Store in float16, bfloat16 or float32. [default: the best]",
        ),
    ] = None,
    checkpoint_every: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Steps between snapshots. [default: the best]")
    ] = None,
    max_checkpoints: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Snapshots kept a profile. [default: the best, up to 64]")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw it: a .png, .svg or .pdf.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a picture that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Propose what to track and store before training.

    Looks for the schedule that writes and updates least and whose worst predicted error in the range is good enough
    (--max-error); where the disk does not allow that, for the smallest error. Shows what else there is (the best of
    each dtype, of one, two and three profiles), with the snapshots kept of each profile and the steps from one to the
    next, and prints the call to paste.

    Errors are those expected if the network moves evenly, like a random walk that in the whole of training goes a
    quarter of the norm of its weights; --like takes the movement of an earlier run instead, stretched over --steps,
    and how exactly its averages were stored. Disk is what the averages take while the last ones are written: one
    more of each profile than is kept. Headers and buffers are not counted.
    """
    from posthoc_cli.planning import Task, propose

    output.log_to_stderr(False)
    out = None if out is None else files.expanded(out)
    _check_picture(out, force)
    task = Task(
        steps=parse_count(steps, "--steps"),
        parameters=parse_count(params, "--params", "1.2e9, 1.2B or 350M"),
        max_bytes=parse_bytes(max_size, "--max-size"),
        sigma_range=parse_sigma_range(sigma_range),
        max_error=parse_max_error(max_error),
        sigma_rels=None if sigma_rels is None else tuple(sorted(parse_sigma_rels(sigma_rels, "--sigma-rels"))),
        dtype=None if dtype is None else DTYPES.get(dtype, dtype),
        checkpoint_every=None if checkpoint_every is None else parse_count(checkpoint_every, "--checkpoint-every"),
        max_checkpoints=None if max_checkpoints is None else parse_count(max_checkpoints, "--max-checkpoints", "20"),
    )
    earlier = read_likeness(like, task.steps)
    with output.working("looking for the best schedules"):
        proposals = propose(replace(task, motion=earlier.motion, rounding=earlier.rounding))
    if out is not None:
        _draw(out, proposals, force)
    if as_json:
        output.print_json(_report(task, like, earlier, proposals))
    else:
        _print(task, like, earlier, proposals, out)


def _check_picture(out: Path | None, force: bool) -> None:
    if out is not None and out.suffix not in PICTURES:
        raise InvalidValueError("--out", f"must end in {', '.join(PICTURES)}", value=out)
    if out is not None:
        check_output(out, "--out", force)


def call_text(proposal: Proposal, sigma_range: tuple[float, float]) -> str:
    """The call that makes a tracker of this kind."""
    schedule = proposal.schedule
    rels = ", ".join(f"{sigma_rel!r}" for sigma_rel in schedule.sigma_rels) + "," * (len(schedule.sigma_rels) == 1)
    return (
        "ema = PostHocEMA.from_model(\n"
        '    model, "run/ema",\n'
        f"    sigma_rels=({rels}), update_every={proposal.update_every},\n"
        f"    checkpoint_every={schedule.checkpoint_every}, max_checkpoints={schedule.max_checkpoints},\n"
        f'    checkpoint_dtype="{proposal.dtype}", sigma_range={sigma_range},\n'
        ")"
    )


def _draw(out: Path, proposals: list[Proposal], force: bool) -> None:
    from posthoc_cli import plots
    from posthoc_cli.planning import ErrorCurve

    curves = [
        ErrorCurve(
            label=proposal.label,
            t=proposal.last_step,
            sigma_rels=proposal.errors.sigma_rels,
            profile_error=proposal.errors.profile_error,
            predicted_error=proposal.errors.predicted_error,
            tracked=proposal.schedule.sigma_rels,
        )
        for proposal in proposals
    ]
    files.write_whole(out, plots.as_file(lambda: plots.error_figure(curves), out.suffix), force)


# --- what is printed -------------------------------------------------------------------------------


def _report(task: Task, like: Path | None, earlier: Likeness, proposals: list[Proposal]) -> dict[str, Any]:
    return {
        "steps": task.steps,
        "parameters": task.parameters,
        "max_bytes": task.max_bytes,
        "sigma_range": list(task.sigma_range),
        "max_error": task.max_error,
        "like": None if like is None else str(like),
        "motion": "assumed" if earlier.motion is None else "like",
        "proposals": [
            {
                "sigma_rels": list(proposal.schedule.sigma_rels),
                "dtype": proposal.dtype,
                "snapshots": proposal.schedule.kept,
                "update_every": proposal.update_every,
                "checkpoint_every": proposal.schedule.checkpoint_every,
                "max_checkpoints": proposal.schedule.max_checkpoints,
                "last_step": proposal.last_step,
                "bytes": proposal.nbytes,
                "worst_error": proposal.errors.worst,
                "median_error": proposal.errors.median,
                "sigma_rel": proposal.errors.sigma_rels.tolist(),
                "predicted_error": proposal.errors.predicted_error.tolist(),
            }
            for proposal in proposals
        ],
        "call": call_text(proposals[0], task.sigma_range),
    }


def _print(task: Task, like: Path | None, earlier: Likeness, proposals: list[Proposal], out: Path | None) -> None:
    columns = ["tracked", "dtype", "kept", "every", "disk", "worst error", "median error"]
    rows = [
        [
            ", ".join(f"{s:g}" for s in proposal.schedule.sigma_rels),
            proposal.dtype,
            str(proposal.schedule.kept),
            f"{proposal.schedule.checkpoint_every:,}",
            output.size_text(proposal.nbytes),
            output.percent(proposal.errors.worst),
            output.percent(proposal.errors.median),
        ]
        for proposal in proposals
    ]
    output.print_table(columns, rows, left=["tracked", "dtype"])
    low, high = task.sigma_range
    assumed = assumption_text(like, earlier)
    output.print_line(f"predicted errors for sigma_rel {low:g} to {high:g} at the end, if {assumed}")
    best = proposals[0]
    if best.last_step < task.steps:
        output.print_line(f"the first one's last snapshot is at step {best.last_step:,} of {task.steps:,}")
    output.print_line("")
    for line in call_text(best, task.sigma_range).splitlines():
        output.print_line(line)
    if out is not None:
        output.print_line("")
        output.print_line(f"wrote {out}")


COMMAND = plan
