"""All experiments, in the order of the table."""

from __future__ import annotations

from torture import bounds, concurrency, damage, faults, forged, fuzz, processes, steering, strangers
from torture.tally import Experiment

ROOMS = (faults, processes, damage, forged, fuzz, strangers, steering, bounds, concurrency)

EXPERIMENTS: list[Experiment] = [experiment for room in ROOMS for experiment in room.EXPERIMENTS]
