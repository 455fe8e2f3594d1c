"""Experiments with processes that die or are stopped: `nursery` does them, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ema_command import unmeasured_environment

from torture.tally import Experiment, Tally


def kills(folder: Path, share: float, seed: int) -> Tally:
    """Trainings killed with SIGKILL, 1,000 times in all, and resumed by their own script."""
    return run_apart("nursery.py", "kills", folder, round(1_000 * share), seed)


def signals(folder: Path, share: float, seed: int) -> Tally:
    """Every command, stopped 600 times in all by Ctrl-C, SIGTERM or SIGKILL."""
    return run_apart("nursery.py", "signals", folder, round(600 * share), seed)


def run_apart(script: str, name: str, folder: Path, count: int, seed: int) -> Tally:
    """What a script beside this one counts in an experiment, in a process of its own."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), name, folder, str(count), str(seed)],
        stdout=subprocess.PIPE,
        check=True,
        env=unmeasured_environment(),  # coverage would be written by every child, or half of it
    )
    return Tally(**json.loads(done.stdout))


EXPERIMENTS = (
    Experiment("trainings killed and resumed by their own script", kills, 0.02),
    Experiment("every command stopped at a random moment", signals, 0.01),
)
