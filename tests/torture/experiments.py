"""All experiments, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torture import Tally, damage, faults, hostile, sharded
from torture.processes import apart


@dataclass(frozen=True)
class Experiment:
    """One row of the table in the guide `durability`, which has the same name."""

    name: str
    run: Callable[[Path, float, int], Tally]
    """Takes an empty folder, the share of all cases to try (0 to 1, at least one of each kind) and a seed."""
    share: float
    """The share that `make test` tries."""


EXPERIMENTS = [
    Experiment("an error at every file operation", faults.errors_at_every_operation, 0.004),
    Experiment("a kill or a loss of power at every file operation", faults.crashes_at_every_operation, 0.015),
    Experiment(
        "trainings killed and resumed by their own script", partial(apart, "killing killed_trainings", 1_000), 0.02
    ),
    Experiment("sweeps killed and continued by the same call", partial(apart, "killing killed_sweeps", 50), 0.06),
    Experiment("every command stopped at a random moment", partial(apart, "killing signalled_commands", 600), 0.01),
    Experiment("every flipped bit", damage.flip_bits, 0.05),
    Experiment("every truncation", damage.truncate, 0.3),
    Experiment("random headers with correct checksums", damage.fuzz, 0.004),
    Experiment("checkpoints of other programs, damaged at random", hostile.damage_checkpoints, 0.05),
    Experiment("pipes, devices, links and pickles in place of files", hostile.replace_files, 0.05),
    Experiment("names that could control terminals, tables and pictures", hostile.name_things, 0.05),
    Experiment("headers that could cost time or memory", damage.bound, 0.005),
    Experiment("readers during thinning and pruning", partial(apart, "meeting readers", 1_000), 0.03),
    Experiment("two writers on one directory", partial(apart, "meeting writers", 300), 0.03),
    Experiment("averages read while another thread updates them", partial(apart, "tearing torn_reads", 10_000), 0.01),
    Experiment("updates interrupted by signal handlers", partial(apart, "tearing torn_states", 10_000), 0.03),
    Experiment("one process of a sharded training killed", sharded.killed_ranks, 0.01),
    Experiment("a full disk for one process of a sharded training", sharded.full_disks, 0.01),
    Experiment("two sharded trainings on one directory", sharded.two_jobs, 0.01),
]
