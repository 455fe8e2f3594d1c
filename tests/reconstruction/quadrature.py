"""The expected squared error of a combination of averages, by its defining integrals."""

from itertools import pairwise

import numpy as np
from scipy import integrate

from posthoc_cli import PowerFunction

QUADRATURE = {"epsabs": 1e-15, "epsrel": 1e-10, "limit": 200}


def expected_square(snapshots, coefficients, target, motion, *kinks):
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


def tail_at(profile, s):
    return float(profile.tail(s))


def density_at(profile, s):
    if isinstance(profile, PowerFunction):
        return float(profile.density(s))
    before = tail_at(profile, s - 1e-4)
    after = tail_at(profile, s + 1e-4)
    return (before - after) / 2e-4
