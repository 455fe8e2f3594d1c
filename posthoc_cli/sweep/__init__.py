"""The search for the best length of an average by the user's metric, and the trials that measure it."""

from posthoc_cli.sweep.command import Sweep
from posthoc_cli.sweep.in_memory import sweep
from posthoc_cli.sweep.search import Axis, SweepReport

__all__ = ["Axis", "Sweep", "SweepReport", "sweep"]
