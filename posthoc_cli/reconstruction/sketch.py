"""The path of the weights as the hook measured it, by random projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from posthoc_cli.profiles import FloatArray, Profile, tails_at

_POINTS = 4  # number of points in a window at which tails are evaluated


@dataclass(frozen=True, eq=False)
class Sketch:
    """The path of the weights as the hook measured it: random projections of their mean over each
    window of updates.

    The projection S is fixed and linear, and preserves squared lengths in expectation: D numbers do
    up to a factor 1 +- sqrt(2 / D). Let m_k be the mean of the k-th window and x_k = S m_k.
    Coefficients c give that window the mass g_k = sum_i c_i P_i(k) - P(k) too much, so that their
    error is measured, whatever the motion is:

        |error|^2 = |sum_k g_k m_k|^2 ~ |sum_k g_k x_k|^2 = |sum_k G_k (x_k+1 - x_k)|^2,    G =
        sum_i c_i tail_i - tail,

    with G at the ends of the windows. That assumes that G is linear within a window: the shorter
    the windows, the more exact it is. Within window k, G departs from the line by b_k in the mean.
    Steady motion, from the previous window to the next one, adds b_k times itself to the error. The
    rest is unseen: motion that the neighbours do not predict, as of a walk, and the part of the
    window's spread that is not steady motion, as of noise.

    `edges` are the times of the first update and of the last one in each window, [K + 1]; for each
    window `folds` is the number of folds, [K], `means` the projected mean, [K, D], and `spread` the
    mean squared distance of the folds' weights from it, [K]."""

    edges: FloatArray
    folds: FloatArray
    means: FloatArray
    spread: FloatArray

    def measure(
        self,
        profiles: Sequence[Profile],
    ) -> tuple[FloatArray, FloatArray]:
        """Compute a column per profile whose combinations are errors: projected, [D, n], and
        unseen, [K + 2, n]."""
        tails = tails_at(self.edges, profiles)
        line = (tails[1:] + tails[:-1]) / 2
        bend = self._mean_tails(profiles) - line
        steps = np.diff(self.means, axis=0)
        along_line = steps.T @ tails[1:-1]
        inside = self._steady * self._inner_share[:, None]
        seen = along_line + inside.T @ bend
        # G, a parabola within a window, has the mean square departure 6/5 b^2 from its line. Noise
        # of n folds of variance s adds 12 s / n, for b = 1.
        of_walk = 6 / 5 * self._inner_share * self._walk
        walk = np.sqrt(of_walk)
        others = np.maximum(self.folds - 1, 1)
        of_noise = 12 * self._unsteady / others
        noise = np.sqrt(of_noise)
        both = np.hypot(walk, noise)
        either = both[:, None] * bend
        # Noise may be equal in all windows, as of weights that alternate: then its contributions
        # add up.
        aligned = noise @ bend
        # The mass of the first update lies on one value, not on the mean of its window.
        spread = np.sqrt(self.spread[0])
        first = spread * tails[0]
        unseen = np.vstack((either, aligned, first))
        return seen, unseen

    def _mean_tails(self, profiles: Sequence[Profile]) -> FloatArray:
        """Compute the means of the tails over each window: shape [K, n]."""
        places = (np.arange(_POINTS) + 0.5) / _POINTS
        begins = self.edges[:-1, None]
        times = begins + self._lengths[:, None] * places
        means = []
        for profile in profiles:
            tails = profile.tail(times)
            means.append(tails.mean(axis=1))
        return np.stack(means, axis=1)

    def walk_length(self, edges: FloatArray) -> FloatArray:
        """Compute the squared length of the walk that the path makes beyond its main direction,
        between edges of windows: shape [edges - 1].

        A projection shows motion in one direction fully, and coefficients fitted to it are right; a
        walk in many directions has errors in those that it does not show. Without that distinction
        errors of oscillations are up to 400 times larger; leaving out 4 or 16 directions in place
        of 1 makes a few ordinary ones larger.
        """
        deviations = self._deviations
        if deviations.any():
            deviations = _without_main_direction(deviations)
        squares = self._square(deviations)
        until = np.append(0.0, np.cumsum(squares))
        ends = np.searchsorted(self.edges[1:], edges[1:], side="right")
        return np.diff(until[ends], prepend=0.0)

    @cached_property
    def _lengths(self) -> FloatArray:
        """The time that each window takes: shape [K]."""
        return np.diff(self.edges)

    @cached_property
    def _inner_share(self) -> FloatArray:
        """The share of a window's motion that lies inside it and not at its ends, 0 for a single
        fold: shape [K]."""
        return 1 - 1 / self.folds**2

    @cached_property
    def _middle(self) -> FloatArray:
        return (self.edges[1:] + self.edges[:-1]) / 2

    @cached_property
    def _steady(self) -> FloatArray:
        """Projected steady motion across each window: shape [K, D]."""
        if len(self.means) < 2:
            return np.zeros_like(self.means)
        slope = np.gradient(self.means, self._middle, axis=0)
        steady = slope * self._lengths[:, None]
        return np.asarray(steady)

    @cached_property
    def _unsteady(self) -> FloatArray:
        """The part of each window's spread that is not steady motion: shape [K]."""
        squares = np.sum(self._steady**2, axis=1)
        steady = self._inner_share * (squares / 12)
        unsteady = np.maximum(self.spread - steady, 0.0)
        return np.asarray(unsteady)

    @cached_property
    def _deviations(self) -> FloatArray:
        """Twice the differences between inner windows' means and the line between their
        neighbours': shape [K - 2, D].

        A walk of variance V across a window has the expected square V. With two windows only, it is
        the difference of their means.
        """
        if len(self.means) < 3:
            return np.diff(self.means, axis=0)
        before = self._middle[:-2]
        after = self._middle[2:]
        passed = self._middle[1:-1] - before
        fraction = passed / (after - before)
        first = self.means[:-2]
        change = self.means[2:] - first
        line = first + change * fraction[:, None]
        deviations = self.means[1:-1] - line
        return np.asarray(2 * deviations)

    @cached_property
    def _walk(self) -> FloatArray:
        """Squared length of a walk across each window: shape [K]."""
        return self._square(self._deviations)

    def _square(self, deviations: FloatArray) -> FloatArray:
        """Compute the squared lengths that deviations stand for; the first and the last window are
        like their neighbours."""
        squares = np.sum(deviations**2, axis=1)
        if len(self.means) < 3:
            total = squares.sum()
            return np.full(len(self.means), total)
        return np.pad(squares, 1, mode="edge")


def _without_main_direction(vectors: FloatArray) -> FloatArray:
    """Remove from vectors, [K, D], their part in their main direction, and scale them up as if it
    had been an average one."""
    _, _, directions = np.linalg.svd(vectors, full_matrices=False)
    main = directions[:1]
    in_main = vectors @ main.T @ main
    others = vectors - in_main
    count = vectors.shape[1]
    scale = np.sqrt(count / (count - 1))
    return np.asarray(others * scale)
