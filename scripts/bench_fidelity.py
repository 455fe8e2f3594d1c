"""Measure the error of averages made from snapshots of training runs, and whether the predicted
error holds.

    python scripts/bench_fidelity.py [--figure FILE]
    python scripts/bench_fidelity.py --hard

Two recorded runs of 9,600 steps (`trajectories.RECIPES`), by which no constant of the method was
chosen, go through the hook: tracked (0.05, 0.10), (0.05, 0.28) and (0.10,), with 8, 20 and 64
evenly spaced snapshot times, stored as float32, float16 and bfloat16. Each directory alone gives
averages of nine widths, two classical decays and a window, by the default and the published method.
All errors are distances in the weights relative to the truth: the sum in float64, by the
definition, over the updates that the tracker made (`following`).

`--hard` measures an independent set of ordinary and of pathological motion instead
(`corner_cases`).

The table: the median of actual / predicted, its maximum, the share of averages whose error is
within 2 and 3 times the predicted one, and more than 3 times above; and of the error relative to
the published method's, and to that of the nearest stored average at the end, the median, the
maximum, and how many are above 1.05. An average without a prediction is within no factor."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path

import corner_cases
import numpy as np
import pictures
from following import Tracking, distances, measure, true_averages
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from tables import FloatArray, in_processes, markdown, ratios, share, within
from trajectories import record

from posthoc_cli.plots import COLOURS, STYLES
from posthoc_cli.targets import Beta, Target, Window, as_target

RUNS = ("denoiser-cosine", "transformer-adamw")
STEPS = 9600
SIGMA_RELS = (0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25, 0.28)
TARGETS: tuple[Target, ...] = (
    *map(as_target, SIGMA_RELS),
    Window(2000),
    Beta(0.999),
    Beta(0.9995),
)
TRACKED = ((0.05, 0.10), (0.05, 0.28), (0.10,))
SNAPSHOTS = (8, 20, 64)
"""Snapshot times, evenly spaced in steps."""

DTYPES = ("float32", "float16", "bfloat16")


def main() -> None:
    """Measure all averages, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hard", action="store_true", help="hard cases in place of recorded runs")
    parser.add_argument("--figure", type=Path, help="file for a picture of error against sigma_rel")
    options = parser.parse_args()
    if options.figure is not None:
        pictures.write(draw, options.figure)
    if options.hard:
        cases = [*corner_cases.CASES]
        errors = in_processes(corner_cases.measure_case, cases)
        print(table(dict(zip(cases, errors, strict=True))))
    else:
        results = in_processes(measure_recorded, RUNS)
        print(table({"recorded runs": np.hstack([*results])}))


def measure_recorded(name: str) -> FloatArray:
    """Return the errors of a recorded run's averages: [4, averages]."""
    trackings = []
    for tracked, count, dtype in product(TRACKED, SNAPSHOTS, DTYPES):
        trackings.append(Tracking(tracked, dtype, STEPS // count))
    return measure(record(name, STEPS), trackings, TARGETS)


def table(results: Mapping[str, FloatArray]) -> str:
    """Return the table of each case's errors."""
    titles = ["", "cells", "actual/predicted", "max", "within 2", "within 3", ">3"]
    titles += ["error/published", "max", ">1.05", "error/nearest", "max", ">1.05"]
    rows = [titles]
    for label, (errors, published, nearest, predicted) in results.items():
        actual = ratios(errors, predicted)
        row = [label, str(len(errors)), *summary(actual)]
        row += [within(actual, 2), within(actual, 3), share(actual > 3)]
        for others in (published, nearest):
            relative = ratios(errors, others)
            row += [*summary(relative), str(np.sum(relative > 1.05))]
        rows.append(row)
    return markdown(rows)


def summary(values: FloatArray) -> list[str]:
    """Return the median and the maximum."""
    return [f"{np.nanmedian(values):.3f}", f"{np.nanmax(values):.3f}"]


# --- the picture
# -----------------------------------------------------------------------------------


def draw() -> Figure:
    """Draw error against sigma_rel, of a run that is set up as by default, but updated at every
    step."""
    tracking = Tracking((0.05, 0.28), "float16", STEPS // 20)
    # Widths are dense towards 0.2887, where errors change fast.
    low = np.geomspace(0.02, 0.22, 80)
    high = np.linspace(0.22, 0.2886, 80)
    widths = np.unique([*low, *high, *tracking.sigma_rels])
    wanted = [as_target(width) for width in widths]
    run = record(RUNS[0], STEPS)
    error, published, _, predicted = measure(run, [tracking], wanted)
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    line = partial(axes.plot, linewidth=1.8)
    axes.set_prop_cycle(color=COLOURS[:4], linestyle=STYLES)
    line(widths, error, label="posthoc_cli")
    line(widths, published, label="published method")
    # The rounding of each width is its own: joined densely, the floor would be a thicket.
    few = true_averages(run, wanted[::6])
    rounded = few.astype(np.float16).astype(np.float64)
    label = "the true average, rounded once to float16"
    line(widths[::6], distances(rounded, few), label=label)
    line(widths, predicted, label="what posthoc_cli predicts")
    axes.legend(fontsize=8, framealpha=0.9)
    _set_labels(axes)
    return figure


def _set_labels(axes: Axes) -> None:
    """Say what is drawn; make both axes logarithmic, with a tick for each width that people
    know."""
    title = f"20 float16 snapshots of 0.05 and 0.28: {RUNS[0]}, {STEPS:,} steps"
    axes.set_title(title, fontsize=11)
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
