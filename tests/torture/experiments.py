"""All experiments, in the order of the table."""

from __future__ import annotations

from torture import damage, forged, fuzz, strangers
from torture.faults import crashes_at_every_operation, errors_at_every_operation
from torture.processes import kills, signals
from torture.tally import Experiment

EXPERIMENTS: list[Experiment] = [
    Experiment("an error at every file operation", errors_at_every_operation, 0.006),
    Experiment("a kill or a loss of power at every file operation", crashes_at_every_operation, 0.03),
    Experiment("trainings killed and resumed by their own script", kills, 0.02),
    Experiment("every command stopped at a random moment", signals, 0.01),
    *damage.EXPERIMENTS,
    *forged.EXPERIMENTS,
    *fuzz.EXPERIMENTS,
    *strangers.EXPERIMENTS,
]
