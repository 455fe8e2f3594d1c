"""Coefficients of the linear combination of stored averages that is nearest to a wanted one. Pure NumPy and SciPy.

`solving` is the entry point; `minvar` and `paper` are the methods, `prior` and `motion` what the first one knows of a
run, `basis` the closed forms of both.
"""

from posthoc_cli.reconstruction.basis import relative_width
from posthoc_cli.reconstruction.least_squares import Losses
from posthoc_cli.reconstruction.measurements import Distance, Measurements
from posthoc_cli.reconstruction.minvar import MinimumVariance
from posthoc_cli.reconstruction.motion import Motion
from posthoc_cli.reconstruction.paper import inner_product
from posthoc_cli.reconstruction.prior import (
    ROUNDING,
    WINDOW,
    Prior,
    StoredAverage,
    assumed_prior,
    measured_prior,
    roundings,
)
from posthoc_cli.reconstruction.rounding import error_after_rounding
from posthoc_cli.reconstruction.solving import METHODS, Reconstruction, check_method, expected_errors, reconstruct
from posthoc_cli.reconstruction.steps import Steps

__all__ = [
    "METHODS",
    "ROUNDING",
    "WINDOW",
    "Distance",
    "Losses",
    "Measurements",
    "MinimumVariance",
    "Motion",
    "Prior",
    "Reconstruction",
    "Steps",
    "StoredAverage",
    "assumed_prior",
    "check_method",
    "error_after_rounding",
    "expected_errors",
    "inner_product",
    "measured_prior",
    "reconstruct",
    "relative_width",
    "roundings",
]
