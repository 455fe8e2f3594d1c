"""The coefficients of the linear combination of stored averages that is nearest to a target.

`solving` has both methods: the published one, and minimum variance, the default. `prior` and `motion` hold what minimum
variance knows about a run, `basis` the linear algebra of both methods. Only rare, rank-deficient problems need SciPy.
"""

from posthoc_cli.reconstruction.basis import Losses, Steps, points_of, relative_width
from posthoc_cli.reconstruction.motion import Motion, Sketch
from posthoc_cli.reconstruction.prior import (
    ASSUMED,
    MEASURED,
    ROUNDING,
    Distance,
    DistanceTo,
    Measurements,
    Prior,
    StoredAverage,
    assumed_prior,
    error_after_rounding,
    measured_prior,
    misfit,
)  # fmt: skip
from posthoc_cli.reconstruction.solving import (
    METHODS,
    MOST_SOLVED,
    MinimumVariance,
    Reconstruction,
    check_method,
    expected_errors,
    one_blas_thread,
    reconstruct,
    thinned_subset,
)

__all__ = [
    "ASSUMED", "MEASURED", "METHODS", "MOST_SOLVED", "ROUNDING", "Distance",
    "DistanceTo", "Losses", "Measurements", "MinimumVariance", "Motion", "Prior", "Reconstruction", "Sketch", "Steps",
    "StoredAverage", "assumed_prior", "check_method", "error_after_rounding", "expected_errors", "measured_prior",
    "misfit", "one_blas_thread", "points_of", "reconstruct", "relative_width", "thinned_subset",
]  # fmt: skip
