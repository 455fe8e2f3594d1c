"""The other averages, next to the post-hoc tracker, and recipes that train with an average."""

from posthoc_cli.averages.differentiable import DifferentiableEMA, EMAStats
from posthoc_cli.averages.recipes import HareAndTortoise, SwitchEMA
from posthoc_cli.averages.weights import ExponentialMovingAverage, ShadowModel

__all__ = ["DifferentiableEMA", "EMAStats", "ExponentialMovingAverage", "HareAndTortoise", "ShadowModel", "SwitchEMA"]
