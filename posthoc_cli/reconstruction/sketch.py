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

from posthoc_cli.profiles import FloatArray, PowerFunction, Profile
from posthoc_cli.profiles.tracked import LONGEST, WINDOW

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

    def of_shared_means(
        self, profiles: Sequence[PowerFunction], largest: float, updates: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Columns of the errors that means with the weights of the `largest` gamma leave: projected, and unseen.

        Within a fold of relative length L these weights are steeper by u = (largest - gamma) L. An average in which the
        fold has the mass m is off by u m / 12 of the steady motion across it, which projections show. To the squared
        error, noise that leaves the variance s in a fold's mean adds u^2 m^2 s / 12, and a walk of v across the
        fold u^2 m^2 v / 120, a third of which is seen as steady. Averages of one profile share what their common folds
        leave. `updates` are those until each edge: folds of two are exact, since the newest value has each profile's
        own weight, and early in a run means are not shared.
        """
        counts = np.maximum(np.diff(updates) / self.folds, 2.0)
        part = (counts - 1) * (counts - 2) / counts**2
        length = np.diff(self.edges) / self.folds / self.edges[1:]
        steeper = np.array([largest - profile.gamma for profile in profiles])
        masses = -np.diff(np.stack([profile.tail(self.edges) for profile in profiles], axis=1), axis=0)
        late = np.logical_or.accumulate((length > 0) & (length * WINDOW <= LONGEST * counts))
        part = np.where(late, part, 0.0)
        bend = (part * length / self.folds / 12)[:, None] * steeper * masses
        # Of n folds with noise s and a walk v each, `_beyond` is s (1 - 1/n) (1 - (1 + 1/n) / (24 n)) +
        # 19/144 v (n - 1/n), and `_squares` 6 s / n + v n.
        n = np.maximum(self.folds, 2.0)
        noise = np.maximum(self._beyond - 19 / 144 * self._inner * self._squares, 0.0)
        noise /= (1 - 1 / n) * (1 - 5 / 6 * (1 + 1 / n) / n)
        walk = np.maximum(self._squares - 6 * noise / n, 0.0) / n
        unseen = 12 * noise / np.where(part > 0, part, 1.0) + 144 / 120 * 2 / 3 * walk
        return self._across.T @ bend, np.sqrt(unseen * self.folds)[:, None] * bend

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

        G, a parabola in a window, departs from its line by 6/5 b^2 in the mean square.
        """
        return np.sqrt(6 / 5 * self._inner * self._squares)

    @cached_property
    def _squares(self) -> FloatArray:
        """The squared length of a walk across each window: shape [K].

        Of a walk with variance v w in a window, a mean misses the line between its neighbours' by v w / 4.
        """
        squares = np.full(len(self.means), np.sum(np.diff(self.means, axis=0) ** 2))
        if len(self.means) > 2:
            place = (self._middle[1:-1] - self._middle[:-2]) / (self._middle[2:] - self._middle[:-2])
            line = self.means[:-2] + (self.means[2:] - self.means[:-2]) * place[:, None]
            squares = np.pad(4 * np.sum((self.means[1:-1] - line) ** 2, axis=1), 1, mode="edge")
        return np.asarray(squares, dtype=np.float64)

    @cached_property
    def _noise(self) -> FloatArray:
        """The same of noise: of n folds with the variance s each, s / n 12 b^2."""
        return np.asarray(np.sqrt(12 * self._beyond / np.maximum(self.folds - 1, 1)))

    @cached_property
    def _beyond(self) -> FloatArray:
        """The spread of each window's folds beyond steady motion: shape [K]."""
        return np.asarray(np.maximum(self.spread - self._inner * np.sum(self._across**2, axis=1) / 12, 0.0))
