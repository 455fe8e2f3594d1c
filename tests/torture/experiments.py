"""All experiments, in the order of the table."""

from __future__ import annotations

from torture import damage, forged, fuzz, strangers
from torture.tally import Experiment

EXPERIMENTS: list[Experiment] = [*damage.EXPERIMENTS, *forged.EXPERIMENTS, *fuzz.EXPERIMENTS, *strangers.EXPERIMENTS]
