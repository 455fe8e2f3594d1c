"""Measure the error of averages made from snapshots of real training runs, and whether the
predicted error holds.

    python scripts/bench_fidelity.py [--only a,b] [--steps 9600] [--cache FOLDER] [--figure FILE]
    python scripts/bench_fidelity.py --hard [--only a,b]

Ten recorded runs of 9,600 steps (`trajectories.RECIPES`), two of them also with update_every=10, go
through the hook: tracked (0.05, 0.10), (0.05, 0.28) and (0.10,), with 8, 20 and 64 evenly spaced
snapshot times, stored as float32, float16 and bfloat16. Where a run restarts its optimizer, the
tracker is closed and continued from its state. Each directory alone gives averages of nine widths,
two classical decays and a window, by the default and the published method. All errors are distances
in the weights relative to the truth: the sum in float64, by the definition, over the updates that
the tracker made (`following`).

Half of the runs are held out: no constant of the method was chosen by them.

`--hard` measures an independent set of ordinary and of pathological motion instead
(`corner_cases`): the share of errors within 2 and 3 times the predicted ones, and more than 3 times
above; and the error relative to the published and to the nearest stored average at the end."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import TypeVar

import corner_cases
import numpy as np
from following import FloatArray, Tracking, compare, distances, track, true_averages
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import ArrayLike
from tables import grouped, in_processes, markdown, ratios, share, within
from trajectories import HELD_OUT, NAMES, add_options, record

from posthoc_cli.plots import COLOURS, STYLES
from posthoc_cli.targets import Beta, Target, Window, as_target

SIGMA_RELS = (0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25, 0.28)
TRACKED = ((0.05, 0.10), (0.05, 0.28), (0.10,))
SNAPSHOTS = (8, 20, 64)
"""Snapshot times, evenly spaced in steps."""

DTYPES = ("float32", "float16", "bfloat16")
STRIDE = 10
"""update_every of the runs that are tracked with gaps."""

UNIT = math.lcm(*SNAPSHOTS) * STRIDE
"""Steps at which every number of snapshots falls on multiples of every stride."""

PICTURED = "denoiser-cosine"
"""Held out."""


@dataclass(frozen=True)
class Job:
    """A recorded run and the update interval of its tracker."""

    name: str
    stride: int = 1

    def __str__(self) -> str:
        return self.name if self.stride == 1 else f"{self.name}-every-{self.stride}"


WITH_GAPS = (Job("denoiser-adam", STRIDE), Job("cnn-batch-norm", STRIDE))
"""One of the two is held out."""

JOBS = [*map(Job, NAMES), *WITH_GAPS]

Asked = TypeVar("Asked")


def main() -> None:
    """Measure all cells, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, 9600, UNIT)
    parser.add_argument("--only", help="some of the runs, or cases, by commas")
    parser.add_argument("--hard", action="store_true", help="hard cases in place of recorded runs")
    parser.add_argument("--figure", type=Path, help="file for a picture of error against sigma_rel")
    options = parser.parse_args()
    if options.figure is not None:
        figure = draw(options.steps, options.cache)
        figure.savefig(options.figure)
    if options.hard:
        cases = _asked([*corner_cases.CASES], options.only)
        cells = in_processes(corner_cases.measure, cases)
        print(hard_table([*chain.from_iterable(cells)]))
    else:
        jobs = _asked(JOBS, options.only)
        work = partial(measure, options.steps, options.cache)
        cells = in_processes(work, jobs)
        print(recorded_table([*chain.from_iterable(cells)]))


def _asked(jobs: list[Asked], only: str | None) -> list[Asked]:
    """Return the jobs whose names are listed; all without a list."""
    if only is None:
        return jobs
    names = only.split(",")
    return [job for job in jobs if str(job) in names]


# --- the recorded runs
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One average of one directory. Errors are Euclidean distances from the truth, relative to its
    norm.

    Attributes:
        run: the job, in words.
        held_out: whether no constant of a method was chosen by it.
        error: of the default method.
        published: of the published one.
        predicted: what the default method said its error would be.
    """

    run: str
    held_out: bool
    error: float
    published: float
    predicted: float


def measure(steps: int, cache: Path | None, job: Job) -> list[Cell]:
    """Measure all cells of one run."""
    # At 9,600 steps the classical averages are 1,000 and 2,000 steps old, the window has 2,000.
    wanted: list[Target] = [*map(as_target, SIGMA_RELS), Window(5 * steps // 24)]
    for age in (9.6, 4.8):
        beta = round(1 - age / steps, 9)
        wanted.append(Beta(beta))
    run = record(job.name, steps, cache)
    truth = true_averages(run, wanted, job.stride)
    trackings = []
    for tracked, count, dtype in product(TRACKED, SNAPSHOTS, DTYPES):
        trackings.append(Tracking(tracked, dtype, steps // count, job.stride))
    held_out = job.name in HELD_OUT
    with track(run, trackings) as folders:
        errors = np.hstack([compare(folder, wanted, truth) for folder in folders])
    return [Cell(str(job), held_out, *of_target) for of_target in errors.T.tolist()]


# --- the tables
# ------------------------------------------------------------------------------------


def recorded_table(cells: Sequence[Cell]) -> str:
    """Return the table of recorded runs: all, held-out ones, then by run.

    The first column of each ratio is its median.
    """
    rows = [["", "cells", "error/published", "max", "actual/predicted", "max", "within 2"]]
    groups = {"all runs": [*cells]}
    held_out = [cell for cell in cells if cell.held_out]
    if held_out:
        groups["held-out runs"] = held_out
    groups |= grouped(cells, "run")
    for label, group in groups.items():
        row = [label, str(len(group))]
        row += summary(ratios(group, "published", 0.0))
        predicted = ratios(group, "predicted", 0.0)
        row += summary(predicted)
        row.append(within(predicted, 2))
        rows.append(row)
    return markdown(rows)


def hard_table(cells: Sequence[corner_cases.Cell]) -> str:
    """Return the table by case; for a single case by run.

    Shares of the cells whose error is within a factor of the predicted one, or more than three
    times above it; of each ratio its median, its maximum, and how many cells are above 1.05. A cell
    without a prediction is within no factor.
    """
    titles = ["", "cells", "within 2", "within 3", ">3", "error/published", "max", ">1.05"]
    rows = [[*titles, "error/nearest", "max", ">1.05"]]
    groups = grouped(cells, "case")
    if len(groups) == 1:
        groups = grouped(cells, "run")
    groups["all"] = [*cells]
    for label, group in groups.items():
        row = [label, str(len(group))]
        predicted = ratios(group, "predicted")
        row += [within(predicted, 2), within(predicted, 3)]
        row.append(share(predicted > 3))
        for other in ("published", "nearest"):
            relative = ratios(group, other)
            row += summary(relative)
            row.append(str(np.sum(relative > 1.05)))
        rows.append(row)
    return markdown(rows)


def summary(values: FloatArray) -> list[str]:
    """Return the median and the maximum."""
    return [f"{np.median(values):.3f}", f"{np.max(values):.3f}"]


# --- the picture
# -----------------------------------------------------------------------------------


def draw(steps: int, cache: Path | None) -> Figure:
    """Draw error against sigma_rel, of a run that is set up as by default, but updated at every
    step."""
    tracking = Tracking((0.05, 0.28), "float16", steps // 20, update_every=1)
    # Widths are dense towards 0.2887, where errors change fast.
    low = np.geomspace(0.02, 0.22, 80)
    high = np.linspace(0.22, 0.2886, 80)
    widths = np.unique([*low, *high, *tracking.sigma_rels])
    wanted = [as_target(width) for width in widths]
    run = record(PICTURED, steps, cache)
    truth = true_averages(run, wanted)
    with track(run, [tracking]) as (folder,):
        error, published, predicted = compare(folder, wanted, truth)
    # The rounding of each width is its own: joined densely, the floor would be a thicket.
    few = truth[::6]
    rounded = few.astype(np.float16).astype(np.float64)
    lines = {
        "posthoc_cli": (widths, error),
        "published method": (widths, published),
        "the true average, rounded once to float16": (widths[::6], distances(rounded, few)),
        "what posthoc_cli predicts": (widths, predicted),
    }
    return _figure(lines, f"tracked (0.05, 0.28): {PICTURED}, {steps:,} steps")


def _figure(lines: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str) -> Figure:
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(lines.items()):
        colour = COLOURS[number]
        axes.plot(*points, STYLES[number], color=colour, linewidth=1.8, label=label)
    axes.set_title(title, fontsize=11)
    _set_scales(axes)
    axes.legend(fontsize=8, framealpha=0.9)
    return figure


def _set_scales(axes: Axes) -> None:
    """Make both axes logarithmic, with a tick for each width that people know."""
    ticks = (0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.28)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.02, 0.2886)
    axes.set_xticks(ticks, map(str, ticks))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sigma_rel (width of the average, as a fraction of training)")
    axes.set_ylabel("relative L2 error of the weights")
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
