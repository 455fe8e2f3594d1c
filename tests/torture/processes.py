"""Experiments with processes that die or are stopped: `nursery` does them, in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import forked

from torture.tally import Experiment, Tally


def kills(folder: Path, share: float, seed: int) -> Tally:
    """Trainings killed with SIGKILL, 1,000 times in all, and resumed by their own script."""
    return run_apart("nursery.py", "kills", folder, round(1_000 * share), seed)


def signals(folder: Path, share: float, seed: int) -> Tally:
    """Every command, stopped 600 times in all by Ctrl-C, SIGTERM or SIGKILL."""
    return run_apart("nursery.py", "signals", folder, round(600 * share), seed)


def run_apart(script: str, name: str, folder: Path, count: int, seed: int) -> Tally:
    """What a script beside this one counts in an experiment, in a process of its own."""
    process = forked.Forked((Path(__file__).parent / script).read_text(), name, folder, count, seed)
    out, err = process.communicate(timeout=1e6)
    assert process.returncode == 0, err
    return Tally(**json.loads(out))


EXPERIMENTS = (
    Experiment("trainings killed and resumed by their own script", kills, 0.02),
    Experiment("every command stopped at a random moment", signals, 0.01),
)
