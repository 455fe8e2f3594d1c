"""The other averages, next to the post-hoc tracker, and recipes that train with an average."""

from posthoc_cli.averages.differentiable import DifferentiableEMA
from posthoc_cli.averages.exponential import ExponentialMovingAverage
from posthoc_cli.averages.recipes import HareAndTortoise, SwitchEMA
from posthoc_cli.averages.shadow import ShadowModel
from posthoc_cli.averages.statistics import EMAStats

__all__ = [
    "DifferentiableEMA",
    "EMAStats",
    "ExponentialMovingAverage",
    "HareAndTortoise",
    "ShadowModel",
    "SwitchEMA",
]
