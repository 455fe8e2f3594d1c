"""Markdown tables, and work in several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column aligned left, the others right."""
    header, *body = rows
    rule = ["---"]
    rule += ["---:" for _ in header[1:]]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, rule, *body)]
    return "\n".join(lines)


def in_processes(work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    """Yield the result of each job, computed in two processes of one thread each."""
    # Small problems side by side, whose threads would fight for the cores; a fork would inherit
    # this one's threads.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    context = get_context("spawn")
    with ProcessPoolExecutor(2, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(work, jobs)
