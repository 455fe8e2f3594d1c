"""The motion of the network as the hook measured it: random projections of the weights' mean over each window.

A projection S is fixed, linear, and keeps squared lengths in the mean: of D numbers, up to a factor 1 +- sqrt(2 / D).
With x_k = S m_k for the mean m_k of the k-th window, the error of coefficients c, which put the weight
g_k = sum_i c_i P_i(k) - P(k) on that window, is measured, whatever the motion is:

    |error|^2 = |sum_k g_k m_k|^2 ~ |sum_k g_k x_k|^2 = |sum_k G_k (x_k+1 - x_k)|^2,    G = sum_i c_i tail_i - tail,

with G at the ends of the windows. That takes G as linear in between: it is as exact as the windows are short. In a
window, G departs from the line by b_k in the mean, and what the weights do there is known from outside only. Their
steady motion, from the window before to the one after, adds b_k times that to the error; the rest is unseen: motion
that neighbours do not foretell, as of a walk, and what a window's own spread has beyond its steady motion, as of noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from posthoc_cli.profiles import FloatArray, Profile

_POINTS = 4
"""Points in a window at which tails are taken."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """The path of the weights, projected.

    Attributes:
        edges: the time of the first update, then that of the last update in each window: shape [K + 1].
        folds: of which each window is made: shape [K].
        means: of the windows, projected: shape [K, D].
        spread: mean squared distance of the folds' weights from their window's mean: shape [K].
    """

    edges: FloatArray
    folds: FloatArray
    means: FloatArray
    spread: FloatArray

    def measured(self, profiles: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
        """Columns whose combinations are errors: as projected, [D, n], and unseen, [K + 1, n].

        Averages are relative to the weights of the first window.
        """
        tails = np.stack([profile.tail(self.edges) for profile in profiles], axis=1)
        within = np.stack(
            [profile.tail(self._within).reshape(-1, _POINTS).mean(axis=1) for profile in profiles], axis=1
        )
        bend = within - (tails[1:] + tails[:-1]) / 2
        seen = np.diff(self.means, axis=0).T @ tails[1:-1] + self._steady.T @ bend
        # Noise may be alike in all windows, as of weights that alternate: its parts may add up.
        alike = self._noise @ bend
        return seen, np.vstack((np.hypot(self._walk, self._noise)[:, None] * bend, alike))

    @cached_property
    def _within(self) -> FloatArray:
        place = (np.arange(_POINTS) + 0.5) / _POINTS
        return (self.edges[:-1, None] + np.diff(self.edges)[:, None] * place).ravel()

    @cached_property
    def _inner(self) -> FloatArray:
        """The share of a window's motion that is within it, and not at its ends: none of a single fold's."""
        return np.asarray(1 - 1 / self.folds**2)

    @cached_property
    def _middle(self) -> FloatArray:
        return (self.edges[1:] + self.edges[:-1]) / 2

    @cached_property
    def _across(self) -> FloatArray:
        """Steady motion across each window: shape [K, D]."""
        if len(self.means) < 2:
            return np.zeros_like(self.means)
        return np.asarray(np.gradient(self.means, self._middle, axis=0) * np.diff(self.edges)[:, None])

    @cached_property
    def _steady(self) -> FloatArray:
        return self._across * self._inner[:, None]

    @cached_property
    def _walk(self) -> FloatArray:
        """The size of the unseen part of a walk, for b = 1: shape [K].

        Of a walk with variance v w in a window, a mean misses the line between its neighbours' by v w / 4 in the mean
        square, and G, a parabola there, departs from its line by 6/5 b^2.
        """
        squares = np.full(len(self.means), np.sum(np.diff(self.means, axis=0) ** 2))
        if len(self.means) > 2:
            place = (self._middle[1:-1] - self._middle[:-2]) / (self._middle[2:] - self._middle[:-2])
            line = self.means[:-2] + (self.means[2:] - self.means[:-2]) * place[:, None]
            squares = np.pad(4 * np.sum((self.means[1:-1] - line) ** 2, axis=1), 1, mode="edge")
        return np.sqrt(6 / 5 * self._inner * squares)

    @cached_property
    def _noise(self) -> FloatArray:
        """The same of noise: of n folds with the variance s each, s / n 12 b^2."""
        steady = self._inner * np.sum(self._across**2, axis=1) / 12
        found = np.sqrt(12 * np.maximum(self.spread - steady, 0.0) / np.maximum(self.folds - 1, 1))
        return np.asarray(found, dtype=np.float64)
