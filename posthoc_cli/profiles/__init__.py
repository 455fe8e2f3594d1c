"""Averaging profiles: how much each moment of training counts in an average. NumPy only, float64.

Training time `s` starts at 0 on the run's clock, in any unit. An average taken at time `t` is sum_k w_k theta_k over
the weights of the network after each step; its profile spreads w_k over the interval from step k-1 to step k, so that
the mass after a step is the sum of the later w. The share that an average keeps of its initial value is a point of
mass at its start, which the tail contains and the density leaves out.

`tracked` has the profiles and the clock that a run records, `other_libraries` the averages of other programs, `others`
the targets. Any object with `density` and `tail` is a `Profile`, too.
"""

from posthoc_cli.profiles.other_libraries import Discrete, Point
from posthoc_cli.profiles.others import (
    SHAPES,
    ClassicalEMA,
    EmulatedDecay,
    StepWindow,
    Uniform,
    convert,
    try_profile,
)  # fmt: skip
from posthoc_cli.profiles.tracked import (
    UNIFORM_SIGMA_REL,
    Clock,
    ClockRecorder,
    FloatArray,
    PowerFunction,
    Profile,
    RecordedPowerFunction,
    StoredProfile,
    check_sigma_rel,
    gamma_from_sigma_rel,
    may_share_mean,
    new_value_share,
    roundings,
    sigma_rel_from_gamma,
    sketched_window_ends,
    window_ends,
)  # fmt: skip

__all__ = [
    "SHAPES", "UNIFORM_SIGMA_REL", "ClassicalEMA", "Clock", "ClockRecorder", "Discrete", "EmulatedDecay",
    "FloatArray", "Point", "PowerFunction", "Profile", "RecordedPowerFunction", "StepWindow", "StoredProfile",
    "Uniform", "check_sigma_rel", "convert", "gamma_from_sigma_rel", "may_share_mean", "new_value_share", "roundings",
    "sigma_rel_from_gamma", "sketched_window_ends", "try_profile", "window_ends",
]  # fmt: skip
