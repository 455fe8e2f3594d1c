"""The best length of an average by a metric of your own: the search, and the evaluations that it asks for."""

from posthoc_cli.sweep.job import Axis, Sweep, SweepReport, sweep

__all__ = ["Axis", "Sweep", "SweepReport", "sweep"]
