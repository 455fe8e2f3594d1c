"""Experiments in processes of their own: processes that die, several in one directory, threads and signals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import forked

from torture.tally import Experiment, Tally


def apart(script: str, name: str, most: int, folder: Path, share: float, seed: int) -> Tally:
    """Run an experiment of a script beside this one, up to `most` times."""
    count = max(1, round(most * share))
    process = forked.Forked((Path(__file__).parent / script).read_text(), name, folder, count, seed)
    out, err = process.communicate(timeout=1e6)
    assert process.returncode == 0, err
    return Tally(**json.loads(out))


PROCESSES = (
    Experiment("trainings killed and resumed by their own script", partial(apart, "nursery.py", "kills", 1_000), 0.02),
    Experiment("every command stopped at a random moment", partial(apart, "nursery.py", "signals", 600), 0.01),
)
CONCURRENCY = (
    Experiment(
        "readers beside a training that thins, and prunings", partial(apart, "meeting.py", "readers", 1_000), 0.03
    ),
    Experiment("two writers on one directory", partial(apart, "meeting.py", "writers", 300), 0.03),
    Experiment("averages read while another thread updates them", partial(apart, "tearing.py", "reads", 10_000), 0.01),
    Experiment("updates interrupted by signal handlers", partial(apart, "tearing.py", "states", 10_000), 0.03),
)
