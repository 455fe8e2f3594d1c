"""All experiments: the rows of the table that `make torture` prints, with the names of the guide `durability`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torture import Tally, damage, faults, hostile, processes, sharded

EXPERIMENTS: dict[str, tuple[Callable[[Path, float, int], Tally], float]] = {
    "an error at every file operation": (faults.errors_at_every_operation, 0.002),
    "a kill or a loss of power at every file operation": (faults.crashes_at_every_operation, 0.008),
    "trainings killed and resumed by their own script": (processes.killed_trainings, 0.01),
    "one process of a sharded training killed": (sharded.killed_ranks, 0.01),
    "two writers on one directory": (processes.writers, 0.02),
    "readers during thinning and pruning": (processes.readers, 0.015),
    "every flipped bit": (damage.flip_bits, 0.02),
    "every truncation": (damage.truncate, 0.1),
    "checkpoints of other programs, damaged at random": (hostile.damage_checkpoints, 0.005),
    "pipes, devices, links and pickles in place of files": (hostile.replace_files, 0.03),
}
"""By name: a function of an empty folder, the share of all cases to try (0 to 1, at least one of each kind) and a seed;
and the share that `make test` tries."""
