"""Experiments with several processes in one directory: `meeting` does them, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ema_command import unmeasured_environment

from torture.tally import Experiment, Tally


def readers(folder: Path, share: float, seed: int) -> Tally:
    """1,000 syntheses of random averages while a training writes and thins, and others prune."""
    return _meeting("readers", folder, max(1, round(1_000 * share)), seed)


def writers(folder: Path, share: float, seed: int) -> Tally:
    """300 times two writers on one directory."""
    return _meeting("writers", folder, max(1, round(300 * share)), seed)


def _meeting(name: str, folder: Path, count: int, seed: int) -> Tally:
    script = Path(__file__).with_name("meeting.py")
    done = subprocess.run(
        [sys.executable, script, name, folder, str(count), str(seed)],
        stdout=subprocess.PIPE,
        check=True,
        env=unmeasured_environment(),  # coverage would be written by every child, or half of it
    )
    return Tally(**json.loads(done.stdout))


EXPERIMENTS = (
    Experiment("readers beside a training that thins, and prunings", readers, 0.03),
    Experiment("two writers on one directory", writers, 0.03),
)
