"""Quadrature nodes that resolve a profile of any shape: for targets that are no power functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import FloatArray, Profile

_ORDER = 16
"""Gauss-Legendre nodes in a piece: exact for polynomials up to degree 31."""

_BISECTIONS = 100


@dataclass(frozen=True)
class Nodes:
    """Points and weights of a quadrature over all intervals, [M] each, and the interval that each point is in."""

    points: FloatArray
    weights: FloatArray
    interval: npt.NDArray[np.intp]

    def integrate(self, values: FloatArray, intervals: int) -> FloatArray:
        """The integral of a function over each interval: values at the points, [M], to [intervals]."""
        sums = np.zeros(intervals)
        np.add.at(sums, self.interval, values * self.weights)
        return sums


def resolving_nodes(profile: Profile, edges: FloatArray) -> Nodes:
    """Nodes for integrals over the intervals between `edges` of anything made of the profile.

    Each interval is cut at quantiles of the profile's mass: evenly spread ones, and ones that approach both ends of
    it geometrically. So an average over the last few steps of an interval of thousands is resolved, and a profile's
    beginning and end (a window's edges) are met to rounding.
    """
    pieces = np.unique(np.concatenate((edges, _quantiles(profile, float(edges[0]), float(edges[-1])))))
    abscissae, weights = np.polynomial.legendre.leggauss(_ORDER)
    half = np.diff(pieces)[:, None] / 2
    points = (pieces[:-1, None] + half) + half * abscissae
    interval = np.searchsorted(edges, pieces[:-1], side="right") - 1
    return Nodes(points.reshape(-1), (half * weights).reshape(-1), np.repeat(interval, _ORDER))


def _quantiles(profile: Profile, start: float, end: float) -> FloatArray:
    """Times in [start, end] at which the tail falls through certain levels; by bisection, since tails never grow."""
    geometric = np.exp2(-np.arange(1.0, 50.0))
    levels = np.unique(np.concatenate((np.linspace(0, 1, 65)[1:-1], geometric, 1 - geometric)))
    low, high = np.full(levels.size, start), np.full(levels.size, end)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = profile.tail(middle) > levels
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return high


def relative_width(profile: Profile, t: float) -> float:
    """Standard deviation of a profile within (0, t], as a fraction of `t`; what sits on its start counts there.

    With F = 1 - tail, partial integration gives t - integral F for the mean and t^2 - 2 integral s F for the mean
    square.
    """
    nodes = resolving_nodes(profile, np.array([0.0, t]))
    below = (1 - profile.tail(nodes.points)) * nodes.weights
    mean = t - float(below.sum())
    return float(np.sqrt(max(t * t - 2 * float(below @ nodes.points) - mean**2, 0.0))) / t
