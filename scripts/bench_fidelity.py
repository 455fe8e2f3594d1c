"""How near the averages are that snapshots make, on real training runs, and whether the error bar holds.

    python scripts/bench_fidelity.py [--cache FOLDER] [--markdown] [--worst] [--json FILE] [--figure FILE.png]
                                     [--runs a,b] [--steps 9600] [--processes 2]
    python scripts/bench_fidelity.py --hard [--case a,b] [--long] [--cache FOLDER] [--markdown] [--worst]
                                     [--json FILE] [--processes 2]
    python scripts/bench_fidelity.py --checkpoints [--steps 9600] [--cache FOLDER] [--markdown] [--processes 2]

Ten recorded runs, of 9,600 steps each (see `trajectories.RECIPES`), two of them once more with update_every=10, go
through the hook: tracked (0.05, 0.10), (0.05, 0.28) and (0.10,), with 8, 20 and 64 snapshot times evenly spaced in
steps, stored as float32, float16 and bfloat16. Where a run's optimizer starts anew, the tracker is closed and goes on
from its state. From each directory alone come the averages of nine widths, of two classical decays and of a window, by
the default method and by the published one.

For each of these cells:

- **error**, **paper**: distance in the weights from the truth of the default method's average and of the published
  one's, relative to the truth; the truth is the sum over the updates that the tracker made, in float64, from the
  definition (`fidelity_runs`);
- **predicted**: what the default method says its error will be;
- **floor**: the error of the truth itself, rounded once to the dtype that snapshots are stored in;
- **oracle**: the error of the best combination of these snapshots, coefficients with sum 1, that knows the truth. No
  method can be better.

Half of the runs are held out: no constant of the method was chosen by them. The numbers are the same at every call on
one machine.

`--hard` measures unusual runs, schedules and questions instead, and an independent set of ordinary and of pathological
motion (`corner_cases`), each against a truth of the same kind. For each case: the share of the errors that are within 2
and 3 times the predicted ones, and more than 3 times above; and the error relative to the published method's, and to
that of the nearest tracked average as it is stored at the end, which costs nothing to take.

`--checkpoints` measures averages of the weights of 8, 20 and 64 steps, evenly spaced and at random, and averages that
`ema_pytorch` and `posthoc_ema` stored with an update every 1, 10 and 100 steps (`checkpoint_fidelity`).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import checkpoint_fidelity
import corner_cases
import corner_report
import corner_runs
import fidelity_report as report
import fidelity_runs as runs
import numpy as np
import torch
from fidelity_runs import Job, Setup
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from posthoc_cli.plots import COLOURS, STYLES

Found = TypeVar("Found")
Asked = TypeVar("Asked")

PICTURED = (Job("denoiser-cosine"), Setup((0.05, 0.28), 20, "float16"))
"""Held out, and set up as by default."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cells, print the tables and the goals."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    if options.hard:
        _hard(options)
    elif options.checkpoints:
        _checkpoints(options)
    else:
        _recorded(options)
    print(f"\nall of it: {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _recorded(options: argparse.Namespace) -> None:
    """The recorded runs."""
    if options.figure is not None:
        errors = _curves(PICTURED[0], options.steps, options.cache)
        draw(_pictured_widths(), errors, options.steps).savefig(options.figure)
    work = partial(runs.measure, steps=options.steps, cache=options.cache)
    # The long ones first, so that no process waits for the other in the end.
    ordered = sorted(options.runs, key=lambda job: (job.stride, job.name != "transformer-adamw", "cnn" not in job.name))
    found = _in_processes(ordered, work, options.processes)
    cells = [cell for job in options.runs for cell in found[job]]
    _write_json(options.json, cells)
    if options.markdown:
        print(f"{report.markdown_table(cells)}\n\n{report.goals_markdown(cells)}")
    else:
        print(f"{_setting(options.steps)}\n\n{report.text_tables(cells)}\n\n{report.goals_text(cells)}")
    if options.worst:
        print(f"\n{report.worst_cells(cells)}")


def _hard(options: argparse.Namespace) -> None:
    """The hard cases."""
    work = partial(corner_cases.measure, long=options.long, cache=options.cache)
    found = _in_processes(options.case, work, options.processes)
    cells = [cell for case in options.case for cell in found[case]]
    _write_json(options.json, cells)
    if options.markdown:
        print(f"{corner_report.markdown_table(cells)}\n\n{corner_report.goals_markdown(cells)}")
    else:
        print(f"{corner_report.text_tables(cells)}\n\n{corner_report.goals_text(cells)}")
    if options.worst:
        print(f"\n{corner_report.worst_cells(cells)}")


def _checkpoints(options: argparse.Namespace) -> None:
    """Ordinary checkpoints, and other libraries' averages."""
    work = partial(checkpoint_fidelity.measure, steps=options.steps, cache=options.cache)
    found = _in_processes(checkpoint_fidelity.JOBS, work, options.processes)
    cells = [cell for job in checkpoint_fidelity.JOBS for cell in found[job]]
    repaired = checkpoint_fidelity.repairs(options.steps, options.cache)
    print(checkpoint_fidelity.tables(cells, repaired, options.markdown))


def _write_json(file: Path | None, cells: Sequence[runs.Cell] | Sequence[corner_runs.Cell]) -> None:
    if file is not None:
        file.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=_steps, default=runs.STEPS, help="length of the runs (9600)")
    parser.add_argument("--runs", type=_jobs, default=runs.JOBS, help="some of the runs, separated by commas")
    parser.add_argument("--cache", type=Path, help="folder to keep recorded runs in, and to take them from")
    parser.add_argument("--hard", action="store_true", help="the hard cases instead of the recorded runs")
    parser.add_argument("--checkpoints", action="store_true", help="checkpoints and other libraries' averages instead")
    parser.add_argument("--case", type=_cases, default=corner_cases.CASES, help="some of them, separated by commas")
    parser.add_argument("--long", action="store_true", help="the hard cases' run of a million updates, too")
    parser.add_argument("--processes", type=int, default=2, help="runs, or cases, at a time (2)")
    parser.add_argument("--markdown", action="store_true", help="the compact table and the goals in Markdown")
    parser.add_argument("--worst", action="store_true", help="also the worst cells of each kind")
    parser.add_argument("--json", type=Path, help="file for all cells")
    parser.add_argument("--figure", type=Path, help="file for a picture of error against sigma_rel")
    return parser


def _steps(text: str) -> int:
    """Every number of snapshots must fall on multiples of every stride."""
    unit = math.lcm(*runs.SNAPSHOTS) * runs.STRIDE
    steps = int(text)
    if steps < unit or steps % unit:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of {unit}")
    return steps


def _jobs(text: str) -> tuple[Job, ...]:
    known = {job.label: job for job in runs.JOBS}
    wanted = text.split(",")
    if unknown := [label for label in wanted if label not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: no such run; choose from {', '.join(known)}")
    return tuple(known[label] for label in wanted)


def _cases(text: str) -> tuple[str, ...]:
    wanted = tuple(text.split(","))
    if unknown := [case for case in wanted if case not in corner_cases.CASES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: no such case; choose from {', '.join(corner_cases.CASES)}")
    return wanted


def _setting(steps: int) -> str:
    return (
        f"{steps:,} steps; medians first, then the extremes; Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}"
    )


# --- many processes --------------------------------------------------------------------------------


def _in_processes(asked: Sequence[Asked], work: Callable[[Asked], Found], processes: int) -> dict[Asked, Found]:
    """`work` on each, with progress on stderr. One process is this one."""
    if processes == 1:
        return {one: work(one) for one in asked}
    found: dict[Asked, Found] = {}
    context = multiprocessing.get_context("spawn")  # a fork would inherit this one's BLAS threads
    started = time.perf_counter()
    with _one_blas_thread(), ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(work, one): one for one in asked}
        for future in as_completed(futures):
            one = futures[future]
            found[one] = future.result()
            label = getattr(one, "label", one)
            seconds = time.perf_counter() - started
            print(f"{len(found)} of {len(asked)}, {seconds:.0f} s: {label}", file=sys.stderr, flush=True)
    return found


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """For the processes that start meanwhile: small problems side by side, whose threads would fight for the cores."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- the picture -----------------------------------------------------------------------------------


def _pictured_widths() -> runs.FloatArray:
    """Dense towards the uniform average, 0.2887, where the errors change fast; those that are tracked among them."""
    return np.unique([*np.geomspace(0.02, 0.22, 80), *np.linspace(0.22, 0.2886, 80), *PICTURED[1].tracked])


def _curves(job: Job, steps: int, cache: Path | None) -> runs.FloatArray:
    return runs.curves(job, PICTURED[1], _pictured_widths(), steps, cache)


def draw(sigma_rels: runs.FloatArray, curves: runs.FloatArray, steps: int) -> Figure:
    """Error against sigma_rel: `curves` is [5, sigma_rels] as `fidelity_runs.compare` gives it."""
    job, setup = PICTURED
    error, paper, predicted, floor, _ = curves
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    every = np.arange(sigma_rels.size)
    # The rounding of each width is its own: joined densely, the floor would be a thicket.
    even = np.unique(np.searchsorted(sigma_rels, np.geomspace(sigma_rels[0], sigma_rels[-1], 25)))
    for values, drawn, colour, style, label in (
        (paper, every, COLOURS[1], STYLES[1], "published method"),
        (error, every, COLOURS[0], STYLES[0], "posthoc_cli"),
        (predicted, every, COLOURS[4], STYLES[3], "what posthoc_cli predicts"),
        (floor, even, COLOURS[2], STYLES[2], f"the true average, rounded once to {setup.dtype}"),
    ):
        axes.plot(sigma_rels[drawn], values[drawn], color=colour, linestyle=style, linewidth=1.8, label=label)
    for position, sigma_rel in enumerate(setup.tracked):
        axes.axvline(
            sigma_rel, color="0.5", linewidth=0.8, zorder=0, label=None if position else "tracked during training"
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
        f"{setup.snapshots} {setup.dtype} snapshots of {' and '.join(f'{s:g}' for s in setup.tracked)}: "
        f"{job.label}, {steps:,} steps",
        fontsize=11,
    )
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, framealpha=0.9)
    return figure


if __name__ == "__main__":
    main()
