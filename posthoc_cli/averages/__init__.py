"""The averages next to the tracker: one decay, a shadow module, statistics of activations."""

from posthoc_cli.averages.exponential import ExponentialMovingAverage
from posthoc_cli.averages.shadow import ShadowModel
from posthoc_cli.averages.statistics import EMAStats

__all__ = [
    "EMAStats",
    "ExponentialMovingAverage",
    "ShadowModel",
]
