"""The search for the best length of an average by the user's metric, and the trials that measure
it."""

from posthoc_cli.sweep.search import Axis, SweepReport
from posthoc_cli.sweep.sweeps import Sweep, sweep
from posthoc_cli.sweep.trials import Metric

__all__ = ["Axis", "Metric", "Sweep", "SweepReport", "sweep"]
