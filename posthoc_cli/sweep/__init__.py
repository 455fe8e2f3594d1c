"""The best length of an average by a metric of your own: the search, and the trials that it asks for."""

from posthoc_cli.sweep.by_command import Sweep
from posthoc_cli.sweep.in_memory import sweep
from posthoc_cli.sweep.results import SweepReport
from posthoc_cli.sweep.search import Axis

__all__ = ["Axis", "Sweep", "SweepReport", "sweep"]
