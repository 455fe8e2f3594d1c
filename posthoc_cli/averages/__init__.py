"""The other averages, beside the post-hoc tracker, and recipes that train with an average."""

from posthoc_cli.averages.differentiable import DifferentiableEMA

__all__ = ["DifferentiableEMA"]
