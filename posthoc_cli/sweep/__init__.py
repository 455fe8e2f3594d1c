"""The search for the best length of an average by the user's metric, and the trials that measure it."""

from posthoc_cli.sweep.command import Sweep
from posthoc_cli.sweep.in_memory import sweep
from posthoc_cli.sweep.results import SweepReport
from posthoc_cli.sweep.search import Axis

__all__ = ["Axis", "Sweep", "SweepReport", "sweep"]
