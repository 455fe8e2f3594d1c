"""Experiments with several processes in one directory, and with threads and signals in one training.

`meeting` and `tearing` do them, in processes of their own.
"""

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


def torn_reads(folder: Path, share: float, seed: int) -> Tally:
    """Averages read 10,000 times in all while another thread updates them."""
    return run_apart("tearing.py", "reads", folder, max(1, round(10_000 * share)), seed)


def torn_states(folder: Path, share: float, seed: int) -> Tally:
    """Updates interrupted 10,000 times in all by signal handlers that raise, read, write or call again."""
    return run_apart("tearing.py", "states", folder, max(1, round(10_000 * share)), seed)


EXPERIMENTS = (
    Experiment("readers beside a training that thins, and prunings", readers, 0.03),
    Experiment("two writers on one directory", writers, 0.03),
    Experiment("averages read while another thread updates them", torn_reads, 0.01),
    Experiment("updates interrupted by signal handlers", torn_states, 0.03),
)
