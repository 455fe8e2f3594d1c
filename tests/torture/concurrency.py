"""Experiments with several processes in one directory: `meeting` does them, in a process of its own."""

from __future__ import annotations

from pathlib import Path

from torture.processes import run_apart
from torture.tally import Experiment, Tally


def readers(folder: Path, share: float, seed: int) -> Tally:
    """1,000 syntheses of random averages while a training writes and thins, and others prune."""
    return run_apart("meeting.py", "readers", folder, max(1, round(1_000 * share)), seed)


def writers(folder: Path, share: float, seed: int) -> Tally:
    """300 times two writers on one directory."""
    return run_apart("meeting.py", "writers", folder, max(1, round(300 * share)), seed)


EXPERIMENTS = (
    Experiment("readers beside a training that thins, and prunings", readers, 0.03),
    Experiment("two writers on one directory", writers, 0.03),
)
