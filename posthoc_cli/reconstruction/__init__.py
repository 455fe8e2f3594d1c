"""The coefficients of the linear combination of stored averages that is nearest to a target.

`solving` has both methods: the published one, and minimum variance, the default. `motion` is what
minimum variance knows about a run: how its network moves, fitted to distances, or from a `sketch`
of its path. `nodes` are what both integrate over.
"""

from posthoc_cli.reconstruction.motion import (
    ASSUMED,
    MEASURED,
    ROUNDING,
    SAMPLED,
    Distance,
    Measurements,
    Motion,
    Prior,
    StoredAverage,
    assumed_prior,
    measured_prior,
    seen_from,
)
from posthoc_cli.reconstruction.nodes import Steps, relative_width
from posthoc_cli.reconstruction.sketch import Sketch
from posthoc_cli.reconstruction.solving import (
    METHODS,
    MOST_SOLVED,
    Eliminator,
    Problem,
    Reconstruction,
    Solver,
    check_method,
    choose_evenly,
    lost_gain,
    one_blas_thread,
    reconstruct,
)

__all__ = [
    "ASSUMED", "MEASURED", "METHODS", "MOST_SOLVED", "ROUNDING", "SAMPLED", "Distance",
    "Eliminator", "Measurements", "Motion", "Prior", "Problem", "Reconstruction", "Sketch",
    "Solver", "Steps", "StoredAverage", "assumed_prior", "check_method", "choose_evenly",
    "lost_gain", "measured_prior", "one_blas_thread", "reconstruct", "relative_width", "seen_from",
]  # fmt: skip
