"""The expected squared error of a combination of averages, by its defining integrals."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from factories import FloatArray
from scipy import integrate

from posthoc_cli.profiles import PowerFunction, Profile
from posthoc_cli.reconstruction import Motion

QUADRATURE = {"epsabs": 1e-15, "epsrel": 1e-10, "limit": 200}


def expected_square(
    snapshots: Sequence[PowerFunction],
    coefficients: FloatArray,
    target: Profile,
    motion: Motion,
    *kinks: float,
) -> float:
    """Integrate between the edges of the motion, the ends of snapshots, and kinks of the target."""

    def square(s, value):
        values = [value(profile, s) for profile in snapshots]
        combined = float(coefficients @ values)
        return (combined - value(target, s)) ** 2

    times = [profile.t for profile in snapshots]
    total = 0.0
    for a, b in pairwise(sorted({*motion.edges, *times, *kinks})):
        middle = (a + b) / 2
        segment = np.searchsorted(motion.edges, middle) - 1
        weights = {tail_at: motion.walk[segment], density_at: motion.noise[segment]}
        for value, weight in weights.items():
            if weight:
                integral, _ = integrate.quad(square, a, b, (value,), **QUADRATURE)
                total += weight * integral
    return total


def tail_at(profile: Profile, s: float) -> float:
    return float(profile.tail(s))


def density_at(profile: Profile, s: float) -> float:
    if isinstance(profile, PowerFunction):
        return float(profile.density(s))
    before = tail_at(profile, s - 1e-4)
    after = tail_at(profile, s + 1e-4)
    return (before - after) / 2e-4
