"""Integrals of power functions over the intervals between snapshot times, and orthonormal functions on them.

Within one interval every stored profile, and the tail of every stored profile, is a sum of a few powers of s. An
orthonormal basis of the space that these powers span comes from a matrix as small as their number, with entries in
closed form; functions of different intervals are orthogonal anyway. In that basis the distance between two averages
is an ordinary sum of squares, and a reconstruction a least-squares problem with few rows, whose condition number is
the *square root* of that of the Gram matrix of its normal equations (9e4 against 8e9 for 512 snapshots of two
profiles).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from posthoc_cli.profiles import FloatArray, PowerFunction, Profile
from posthoc_cli.reconstruction.quadrature import Nodes, resolving_nodes


class IntervalBasis:
    """Orthonormal functions on each interval (edge_k, edge_k+1], spanning s**p for the given exponents p.

    Shapes: exponents [G], edges [K + 1], growing, the first may be 0. With u = s / edge_k+1, f_g = u**p_g / n_g is a
    power scaled to norm 1; the functions e_j = sum_g f_g V_gj / sqrt(lambda_j), with the eigenvalues lambda and
    eigenvectors V of the Gram matrix of the f, are orthonormal. Directions that rounding cannot tell from zero (nearly
    equal exponents, very narrow intervals) are left out.
    """

    def __init__(self, exponents: FloatArray, edges: FloatArray) -> None:
        self._exponents = exponents
        self.edges = edges
        self.ends = edges[1:]
        self._log_ratio = np.full(self.ends.size, np.inf)
        inner = edges[:-1] > 0
        # Not a difference of logarithms: of two times that differ in their last bit it would be 0.
        self._log_ratio[inner] = np.log1p(np.diff(edges)[inner] / edges[:-1][inner])
        gram = self.moment(exponents[:, None] + exponents[None, :])  # [K, G, G]
        self._norms = np.sqrt(np.einsum("kgg->kg", gram))
        gram /= self._norms[:, :, None] * self._norms[:, None, :]
        eigenvalues, vectors = np.linalg.eigh(gram)
        kept = eigenvalues > exponents.size * np.finfo(np.float64).eps
        scale = np.where(kept, 1 / np.sqrt(np.where(kept, eigenvalues, 1.0)), 0.0)
        self._to_basis = vectors * scale[:, None, :]  # [K, G, G]

    def moment(self, power: FloatArray | float) -> FloatArray:
        """Integral of (s / end)**power over each interval, power > -1: shape [K] + that of `power`."""
        power = np.asarray(power, dtype=np.float64) + 1
        shape = (-1,) + (1,) * power.ndim
        length = -np.expm1(-power * self._log_ratio.reshape(shape)) / power
        return np.asarray(self.ends.reshape(shape) * length, dtype=np.float64)

    def expand(self, exponent: FloatArray, amplitude: FloatArray) -> FloatArray:
        """The functions amplitude_kn (s / end_k)**exponent_n in this basis: [N] or [1], [K, N] to [K, G, N].

        A power with the exponent of a basis function is represented exactly; others by their projection.
        """
        distinct, place = np.unique(exponent, return_inverse=True)  # many snapshots have the same
        overlap = self.moment(self._exponents[:, None] + distinct)[:, :, place]  # [K, G, N]
        overlap = overlap * (amplitude[:, None, :] / self._norms[:, :, None])
        return np.asarray(np.einsum("kgj,kgn->kjn", self._to_basis, overlap), dtype=np.float64)

    def project(self, values: FloatArray, nodes: Nodes) -> FloatArray:
        """The projection of any function, given by its values at quadrature nodes: [M] to [K, G]."""
        index = nodes.interval
        powers = (nodes.points / self.ends[index])[:, None] ** self._exponents / self._norms[index]
        overlap = np.zeros((self.ends.size, self._exponents.size))
        np.add.at(overlap, index, powers * (values * nodes.weights)[:, None])
        return np.asarray(np.einsum("kgj,kg->kj", self._to_basis, overlap), dtype=np.float64)


class StoredFunctions(ABC):
    """One function of each stored profile, in orthonormal functions of the intervals between `edges`.

    On interval k it is a sum of terms amplitude_kn (s / end_k)**power_n, and zero after the profile's own time.
    """

    def __init__(self, exponents: FloatArray, edges: FloatArray) -> None:
        self._basis = IntervalBasis(exponents, edges)

    @abstractmethod
    def terms(self, gamma: FloatArray, t: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
        """(power [n] or [1], amplitude [K, n]) of each term, for power functions of `gamma` at `t`."""

    @abstractmethod
    def values(self, profile: Profile, s: FloatArray) -> FloatArray:
        """The function of any profile."""

    def of_powers(self, gamma: FloatArray, t: FloatArray) -> FloatArray:
        """Power functions: shape [K, G, n]."""
        return np.asarray(sum(self._basis.expand(power, amplitude) for power, amplitude in self.terms(gamma, t)))

    def of_target(self, target: Profile) -> tuple[FloatArray, FloatArray]:
        """Any profile, [K, G], and the integral of its square over each interval, [K].

        Power functions in closed form, everything else by quadrature.
        """
        if isinstance(target, PowerFunction):
            gamma, t = np.array([target.gamma]), np.array([target.t])
            return self.of_powers(gamma, t)[:, :, 0], self.squares(gamma, t)[:, 0]
        nodes = resolving_nodes(target, self._basis.edges)
        values = self.values(target, nodes.points)
        return self._basis.project(values, nodes), nodes.integrate(values**2, self._basis.ends.size)

    def squares(self, gamma: FloatArray, t: FloatArray) -> FloatArray:
        """Integrals of the squares of power functions over each interval: shape [K, n]."""
        terms = self.terms(gamma, t)
        products = [a * b * self._basis.moment(p + q) for p, a in terms for q, b in terms]
        return np.asarray(sum(products), dtype=np.float64)

    def _ratio(self, t: FloatArray) -> tuple[FloatArray, FloatArray]:
        """1 on the intervals up to t, and the ratio of their ends to t: shape [K, n] each."""
        end = self._basis.ends[:, None]
        present = (end <= t).astype(np.float64)
        return present, np.where(end <= t, end / t, 0.0)


class Tails(StoredFunctions):
    """Tails, 1 - (s/t)**(gamma + 1) for a power function."""

    def __init__(self, gammas: FloatArray, edges: FloatArray) -> None:
        super().__init__(np.concatenate(([0.0], gammas + 1)), edges)

    def terms(self, gamma: FloatArray, t: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
        """The two terms of 1 - (end/t)**(gamma+1) (s/end)**(gamma+1)."""
        present, ratio = self._ratio(t)
        return [(np.zeros(1), present), (gamma + 1, -(ratio ** (gamma + 1)))]

    def values(self, profile: Profile, s: FloatArray) -> FloatArray:
        """The tail."""
        return profile.tail(s)


class Densities(StoredFunctions):
    """Densities, (gamma + 1) s**gamma / t**(gamma + 1) for a power function."""

    def __init__(self, gammas: FloatArray, edges: FloatArray) -> None:
        super().__init__(gammas, edges)

    def terms(self, gamma: FloatArray, t: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
        """The one term."""
        present, ratio = self._ratio(t)
        return [(gamma, present * (gamma + 1) / t * ratio**gamma)]

    def values(self, profile: Profile, s: FloatArray) -> FloatArray:
        """The density."""
        return profile.density(s)
