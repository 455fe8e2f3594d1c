"""All experiments, in the order of the table."""

from __future__ import annotations

from torture.faults import crashes_at_every_operation, errors_at_every_operation
from torture.tally import Experiment

EXPERIMENTS: list[Experiment] = [
    Experiment("an error at every file operation", errors_at_every_operation, 0.006),
    Experiment("a kill or a loss of power at every file operation", crashes_at_every_operation, 0.03),
]
