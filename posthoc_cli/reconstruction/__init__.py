"""Coefficients: which linear combination of stored averages comes nearest to a wanted one. Pure NumPy and SciPy."""

from posthoc_cli.reconstruction.measurements import Distance, Measurements
from posthoc_cli.reconstruction.paper import METHODS, Reconstruction, check_method, inner_product, reconstruct

__all__ = [
    "METHODS",
    "Distance",
    "Measurements",
    "Reconstruction",
    "check_method",
    "inner_product",
    "reconstruct",
]
