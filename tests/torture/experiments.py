"""All experiments, in the order of the table."""

from __future__ import annotations

from torture import bounds, damage, faults, foreign, fuzz, processes, sharded, steering, strangers
from torture.tally import Experiment

EXPERIMENTS: list[Experiment] = [
    *faults.EXPERIMENTS, *processes.PROCESSES, *damage.EXPERIMENTS, *fuzz.EXPERIMENTS,
    *foreign.EXPERIMENTS, *strangers.EXPERIMENTS, *steering.EXPERIMENTS, *bounds.EXPERIMENTS, *processes.CONCURRENCY,
    *sharded.EXPERIMENTS,
]  # fmt: skip
