"""The other averages, beside the post-hoc tracker, and recipes that train with an average."""

from posthoc_cli.averages.differentiable import DifferentiableEMA
from posthoc_cli.averages.recipes import HareAndTortoise, SwitchEMA

__all__ = ["DifferentiableEMA", "HareAndTortoise", "SwitchEMA"]
