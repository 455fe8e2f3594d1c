"""Measure the error of averages made from snapshots of real training runs, and whether the
predicted error holds.

    python scripts/bench_fidelity.py [--only a,b] [--steps 9600] [--cache FOLDER] [--json FILE]
    [--figure FILE.png] python scripts/bench_fidelity.py --hard [--only a,b] [--json FILE]

Ten recorded runs of 9,600 steps (`trajectories.RECIPES`), two of them also with update_every=10, go
through the hook: tracked (0.05, 0.10), (0.05, 0.28) and (0.10,), with 8, 20 and 64 evenly spaced
snapshot times, stored as float32, float16 and bfloat16. Where a run restarts its optimizer, the
tracker is closed and continued from its state. Each directory alone gives averages of nine widths,
two classical decays and a window, by the default and the published method. All errors are distances
in the weights relative to the truth: the sum in float64, by the definition, over the updates that
the tracker made (`fidelity_runs`).

- **error**, **paper**: of the default method's average and of the published one's.
- **predicted**: what the default method states.
- **floor**: of the truth itself, rounded once to the storage dtype.

Half of the runs are held out: no constant of the method was chosen by them.

`--hard` measures an independent set of ordinary and of pathological motion instead
(`corner_cases`): the share of errors within 2 and 3 times the predicted ones, and more than 3 times
above; and the error relative to the published and to the nearest stored average at the end."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import corner_cases
import fidelity_runs as runs
import numpy as np
import numpy.typing as npt
import torch
from compare_peers import markdown
from fidelity_runs import FloatArray, Job
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from posthoc_cli.plots import COLOURS, STYLES
from posthoc_cli.targets import as_target

LEAST = 2.0**-23
"""The least error of hard cases: eps of float32, to which averages and results are rounded."""
Found = TypeVar("Found")
Asked = TypeVar("Asked")

PICTURED = Job("denoiser-cosine"), ((0.05, 0.28), 20, "float16")
"""Held out, and set up as by default."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cells, print the table."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    measured = partial(_in_processes, processes=options.processes)
    cells: Sequence[Any]
    if options.hard:
        cases = [case for case in corner_cases.CASES if _is_asked(case, options.only)]
        cells = measured(cases, corner_cases.measure)
        print(hard_table(cells))
    else:
        if options.figure is not None:
            draw(options.steps, options.cache).savefig(options.figure)
        jobs = [job for job in runs.JOBS if _is_asked(job.label, options.only)]
        measure = partial(runs.measure, steps=options.steps, cache=options.cache)
        cells = measured(jobs, measure)
        print(recorded_table(cells))
    if options.json is not None:
        content = [asdict(cell) for cell in cells]
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nall of it: {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _is_asked(label: str, only: Sequence[str] | None) -> bool:
    return only is None or label in only


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=_steps, default=runs.STEPS, help="length of the runs (9600)"
    )
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help="some of the runs, or cases, by commas"
    )
    parser.add_argument(
        "--cache", type=Path, help="folder to keep recorded runs in, and to take them from"
    )
    parser.add_argument(
        "--hard", action="store_true", help="the hard cases instead of the recorded runs"
    )
    parser.add_argument("--processes", type=int, default=2, help="runs, or cases, at a time (2)")
    parser.add_argument("--json", type=Path, help="file for all cells")
    parser.add_argument("--figure", type=Path, help="file for a picture of error against sigma_rel")
    return parser


def _steps(text: str) -> int:
    """Parse a number of steps at which every number of snapshots falls on multiples of every
    stride."""
    unit = math.lcm(*runs.SNAPSHOTS) * runs.STRIDE
    steps = int(text)
    if steps < unit or steps % unit:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of {unit}")
    return steps


def _in_processes(
    asked: Sequence[Asked],
    work: Callable[[Asked], list[Found]],
    processes: int,
) -> list[Found]:
    """Return the results of `work` for each item, computed in two processes, with progress on
    stderr."""
    if processes == 1:
        return [one for found in map(work, asked) for one in found]
    # Small problems side by side, whose threads would fight for the cores; a fork would inherit
    # this one's threads.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("spawn")
    cells = []
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        for one, found in zip(asked, pool.map(work, asked), strict=True):
            print(getattr(one, "label", one), file=sys.stderr, flush=True)
            cells += found
    return cells


# --- the tables
# ------------------------------------------------------------------------------------


def ratios(cells: Sequence[Any], over: str, least: float = 0.0) -> FloatArray:
    """Return the error of each cell divided by another one, for cells that have both."""
    errors = np.array([cell.error for cell in cells], dtype=np.float64)
    others = np.array([getattr(cell, over) for cell in cells], dtype=np.float64)
    found = np.maximum(errors, least) / np.maximum(others, least)
    return found[~np.isnan(errors + others)]


def grouped(cells: Iterable[Any], label: Callable[[Any], str]) -> dict[str, list[Any]]:
    """Return the cells by label, in order of first appearance."""
    groups = defaultdict[str, list[Any]](list)
    for cell in cells:
        groups[label(cell)].append(cell)
    return groups


def storage(cell: Any) -> str:
    """Return how a cell's snapshots are stored, and of which averages they are."""
    tracked = ", ".join(f"{sigma_rel:.2f}" for sigma_rel in cell.tracked)
    return f"{cell.dtype}, ({tracked})"


def run_of(cell: Any) -> str:
    """Return the run of a cell, and whether it is held out."""
    return f"{cell.run} (held out)" if cell.held_out else str(cell.run)


def recorded_table(cells: Sequence[Any]) -> str:
    """Return the table of recorded runs: all, held-out ones, then by storage, number of snapshots,
    target and run.

    The first column of each ratio is its median.
    """
    rows = [
        (
            "",
            "cells",
            "error/published",
            "max",
            "error/floor",
            "actual/predicted",
            "max",
            "in [0.5, 2]",
        )
    ]
    held_out = [cell for cell in cells if cell.held_out]
    groups = {"all runs": cells}
    if held_out:
        groups["held-out runs"] = held_out
    groups |= grouped(cells, storage)
    groups |= grouped(cells, lambda cell: f"{cell.snapshots} snapshots")
    groups |= grouped(cells, lambda cell: cell.target)
    groups |= grouped(cells, run_of)
    for label, group in groups.items():
        predicted = ratios(group, "predicted")
        row = [label, str(len(group))]
        row += summary(ratios(group, "paper"), "median", "max")
        row += summary(ratios(group, "floor"), "median")
        row += summary(predicted, "median", "max")
        row.append(share(within(predicted, 2)))
        rows.append(tuple(row))
    return markdown(rows)


def hard_table(cells: Sequence[Any]) -> str:
    """Return the table by case; for a single case by run.

    Shares of the cells whose error is within a factor of the predicted one, or more than three
    times above it; of each ratio its median, its maximum, and how many cells are above 1.05.
    Unknown are cells without a prediction.
    """
    titles = "", "cells", "within 2", "within 3", ">3", "error/published", "max", ">1.05"
    rows = [(*titles, "error/nearest", "max", ">1.05", "unknown")]
    groups = grouped(cells, lambda cell: cell.case)
    if len(groups) == 1:
        groups = grouped(cells, lambda cell: cell.run)
    for label, group in ({"all": cells} | groups).items():
        predicted = ratios(group, "predicted", LEAST)
        row = [label, str(len(group))]
        row += [share(within(predicted, 2)), share(within(predicted, 3)), share(predicted > 3)]
        for over in ("paper", "nearest"):
            found = ratios(group, over, LEAST)
            row += [*summary(found, "median", "max"), str(np.sum(found > 1.05))]
        row.append(str(len(group) - predicted.size))
        rows.append(tuple(row))
    return markdown(rows)


def summary(values: FloatArray, *names: str) -> list[str]:
    """Return the results of these NumPy functions, in three digits; empty texts without values."""
    if not values.size:
        return [""] * len(names)
    found = [float(getattr(np, name)(values)) for name in names]
    return [f"{one:.3f}" if one < 10 else f"{one:.1f}" for one in found]


def within(values: FloatArray, factor: float) -> npt.NDArray[np.bool_]:
    """Return which of the ratios are within a factor of 1."""
    return (values >= 1 / factor) & (values <= factor)


def share(holds: npt.NDArray[np.bool_]) -> str:
    """Return the share of true values, in percent."""
    return f"{100 * np.mean(holds):.1f} %" if holds.size else ""


# --- the picture
# -----------------------------------------------------------------------------------


def _pictured_widths() -> FloatArray:
    """Return widths for the picture, among them the tracked ones; dense towards 0.2887, where
    errors change fast."""
    _, (tracked, _, _) = PICTURED
    low = np.geomspace(0.02, 0.22, 80)
    high = np.linspace(0.22, 0.2886, 80)
    return np.unique([*low, *high, *tracked])


def draw(steps: int, cache: Path | None) -> Figure:
    """Draw error against sigma_rel."""
    job, setup = PICTURED
    tracked, snapshots, dtype = setup
    sigma_rels = _pictured_widths()
    targets = [as_target(width) for width in sigma_rels]
    (curves,) = runs.measure_setups(job, [setup], targets, steps, cache)
    error, paper, predicted, floor = curves
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    every = np.arange(sigma_rels.size)
    # The rounding of each width is its own: joined densely, the floor would be a thicket.
    places = np.geomspace(sigma_rels[0], sigma_rels[-1], 25)
    even = np.unique(np.searchsorted(sigma_rels, places))
    for values, drawn, colour, style, label in (
        (paper, every, COLOURS[1], STYLES[1], "published method"),
        (error, every, COLOURS[0], STYLES[0], "posthoc_cli"),
        (predicted, every, COLOURS[4], STYLES[3], "what posthoc_cli predicts"),
        (floor, even, COLOURS[2], STYLES[2], f"the true average, rounded once to {dtype}"),
    ):
        axes.plot(
            sigma_rels[drawn],
            values[drawn],
            color=colour,
            linestyle=style,
            linewidth=1.8,
            label=label,
        )
    for position, sigma_rel in enumerate(tracked):
        axes.axvline(
            sigma_rel,
            color="0.5",
            linewidth=0.8,
            zorder=0,
            label=None if position else "tracked during training",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(sigma_rels[0], sigma_rels[-1])
    ticks = (0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.28)
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sigma_rel (width of the average, as a fraction of training)")
    axes.set_ylabel("relative L2 error of the weights")
    axes.set_title(
        f"{snapshots} {dtype} snapshots of {' and '.join(f'{s:g}' for s in tracked)}: "
        f"{job.label}, {steps:,} steps",
        fontsize=11,
    )
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, framealpha=0.9)
    return figure


if __name__ == "__main__":
    main()
