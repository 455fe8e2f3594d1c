"""Markdown tables of measured errors, and measurements in several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float64]

LEAST = 2.0**-23
"""The least error: eps of float32, to which averages and results are rounded."""


def in_processes(work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
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


def ratios(errors: FloatArray, others: FloatArray) -> FloatArray:
    """Return errors divided by other ones."""
    return np.divide(np.maximum(errors, LEAST), np.maximum(others, LEAST))


def within(values: FloatArray, factor: float) -> str:
    """Return the share of ratios that are within a factor of 1."""
    larger = np.maximum(values, 1 / values)
    return share(larger <= factor)


def share(holds: npt.ArrayLike) -> str:
    """Return the share of true values, in percent."""
    return f"{100 * np.mean(holds):.1f} %"
