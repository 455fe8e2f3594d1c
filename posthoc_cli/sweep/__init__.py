"""The search for the best length of an average by the user's metric, and the trials that measure
it."""

from posthoc_cli.sweep.metric import Metric
from posthoc_cli.sweep.report import SweepReport
from posthoc_cli.sweep.search import Lengths
from posthoc_cli.sweep.sweeps import Sweep

__all__ = ["Lengths", "Metric", "Sweep", "SweepReport"]
