"""An average of tensors that carries gradients: the module, how each mode keeps them, and recorded values."""

from posthoc_cli.averages.differentiable.ema import DifferentiableEMA

__all__ = ["DifferentiableEMA"]
