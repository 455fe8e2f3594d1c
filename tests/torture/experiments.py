"""All experiments, in the order of the table."""

from __future__ import annotations

from torture.tally import Experiment

EXPERIMENTS: list[Experiment] = []
