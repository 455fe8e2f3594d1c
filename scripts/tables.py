"""Markdown tables of measured errors, and measurements in several processes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

LEAST = 2.0**-23
"""The least error: eps of float32, to which averages and results are rounded."""


def in_processes(work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    """Yield the result of each job, computed in two processes of one thread each."""
    # Small problems side by side, whose threads would fight for the cores; a fork would inherit
    # this one's threads.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    context = get_context("spawn")
    with ProcessPoolExecutor(2, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(work, jobs)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column aligned left, the others right."""
    header, *body = rows
    rule = ["---"]
    rule += ["---:" for _ in header[1:]]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, rule, *body)]
    return "\n".join(lines)


# --- cells: objects with an `error`, and errors to compare it with


def grouped(cells: Sequence[Any], attribute: str) -> dict[str, list[Any]]:
    """Return the cells by an attribute, in order of first appearance."""
    groups = defaultdict[str, list[Any]](list)
    for cell in cells:
        label = getattr(cell, attribute)
        groups[label].append(cell)
    return groups


def ratios(cells: Sequence[Any], over: str, least: float = LEAST) -> npt.NDArray[np.float64]:
    """Return the error of each cell divided by another one."""
    errors = []
    others = []
    for cell in cells:
        errors.append(max(cell.error, least))
        others.append(max(getattr(cell, over), least))
    return np.divide(errors, others)


def within(values: npt.NDArray[np.float64], factor: float) -> str:
    """Return the share of ratios that are within a factor of 1."""
    larger = np.maximum(values, 1 / values)
    return share(larger <= factor)


def share(holds: npt.ArrayLike) -> str:
    """Return the share of true values, in percent."""
    return f"{100 * np.mean(holds):.1f} %"
