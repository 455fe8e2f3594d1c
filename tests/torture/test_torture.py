"""The experiments on what the guide `snapshots` promises; `make torture` runs all of each and
prints a table."""

import pytest
from checking import heavy

from torture import faults, hostile, processes
from torture.training import Tally

EXPERIMENTS = {
    "an error at every file operation": (faults.errors_at_every_operation, 0.001),
    "a kill or a loss of power at every file operation": (faults.crashes_at_every_operation, 0.003),
    "trainings killed and resumed by their own script": (processes.killed_trainings, 0.005),
    "one process of a sharded training killed": (processes.killed_ranks, 0.01),
    "two writers on one directory": (processes.writers, 0.01),
    "readers during thinning and pruning": (processes.readers, 0.01),
    "every flipped bit": (hostile.flip_bits, 0.01),
    "every truncation": (hostile.truncate, 0.05),
    "checkpoints of other programs, damaged at random": (hostile.damage_checkpoints, 0.0025),
    "pipes, devices, links and pickles in place of files": (hostile.replace_files, 0.02),
}
"""By name: a function of an empty folder, the share of all cases to try (0 to 1, at least one of
each kind) and a seed; and the share that the gate tries."""


@heavy
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nothing_is_lost_missed_or_executed(name, tmp_path):
    experiment, share = EXPERIMENTS[name]
    tally = experiment(tmp_path, share, 0)
    assert tally.tried > 0
    assert tally == Tally(tally.tried)


@pytest.mark.timeout(120)
def test_small_files_that_cannot_be_read_are_named(tmp_path):
    """A pipe would wait for a writer, a device fill the memory."""
    tally = hostile.replace_files(tmp_path, 1.0, 0, hostile.SMALL_FILES, hostile.UNREADABLE)
    assert tally.tried > 90
    assert tally == Tally(tally.tried)
