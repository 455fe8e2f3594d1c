"""Correlated rounding errors of stored copies.

The two errors of an element that moves by several spacings of the storage dtype between snapshots are independent. An
element that hardly moves is rounded to the same value, and a combination of both snapshots does not average the error
away. Errors are uniform within a spacing h, of variance r = h^2 / 12, and periodic in the value with period h. By the
Fourier series of that sawtooth, after a Gaussian displacement of variance d their correlation is

    rho = 6 / pi^2 sum_k k^-2 exp(-2 pi^2 k^2 d / h^2) = 6 / pi^2 sum_k k^-2 exp(-pi^2 / 6 k^2 d / r).

With sums over all elements for d and r it holds for a network whose elements move by equally many spacings. As a
function of expected squared distances it is a mixture of Gaussian kernels, hence positive semidefinite.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy import linalg

from posthoc_cli.profiles import FloatArray

_TERMS = 64
_FAR = 12.0
"""Squared distance, in roundings, beyond which the correlation is negligible: exp(-pi^2 / 6 * 12) = 3e-9."""

_LARGEST = 0.99
"""Correlation of copies without motion between them. With 1, coefficients of opposite signs could cancel errors whose
sizes differ a little, and grow without bound."""


def rounding_factor(rounding: FloatArray, arithmetic: FloatArray, apart: FloatArray) -> FloatArray:
    """A matrix B with B^T B = the covariance of the stored copies' errors: shape [n, n].

    Arguments:
        rounding: variance of each copy's rounding: shape [n].
        arithmetic: variance of each copy's other, independent errors: shape [n].
        apart: expected squared distances of the averages: shape [n, n].
    """
    root = np.sqrt(rounding)
    scale = root[:, None] * root
    with np.errstate(over="ignore"):  # infinity is a valid limit
        limit = _FAR * scale
    near = (apart < limit) & ~np.eye(root.size, dtype=bool)
    if not near.any():
        return np.diag(np.sqrt(rounding + arithmetic))
    correlation = np.eye(root.size)
    correlation[near] = _LARGEST * _correlation(apart[near] / scale[near])
    # Divide and conquer, since the default driver fails on about one in a hundred of these clustered spectra.
    values, vectors = linalg.eigh(correlation * scale + np.diag(arithmetic), driver="evd")
    return np.asarray(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T, dtype=np.float64)


def inherited_factor(inherited: FloatArray, gamma: FloatArray, times: FloatArray) -> FloatArray:
    """A matrix B with B^T B = the covariance of errors that averages inherit from rounded snapshots: shape [n, n].

    An average keeps the share (t_i / t)^(gamma + 1) of the error of an earlier one of its profile; the rest of its
    error arose in between.

    Arguments:
        inherited: variance of each average's error: shape [n].
        gamma, times: of the averages, the times growing: shape [n] each.
    """
    factor = np.zeros((times.size, times.size))
    for own in (np.flatnonzero(gamma == one) for one in np.unique(gamma)):
        factor[own[0], own[0]] = np.sqrt(inherited[own[0]])
        for before, after in pairwise(own.tolist()):
            kept = factor[:, before] * (times[before] / times[after]) ** (gamma[after] + 1)
            have = float(kept @ kept)
            factor[:, after] = kept * np.sqrt(min(1.0, inherited[after] / have)) if have > 0 else 0.0
            factor[after, after] = np.sqrt(max(inherited[after] - have, 0.0))
    return factor


def error_after_rounding(error: float, rounding: float, spread: float, moved: float, share: float) -> float:
    """Expected squared error of an average that resumes from its stored copy, after an earlier error.

    A copy lies on the values of the storage dtype, so that the next rounding depends only on the displacement from
    there: `share` times the average's lag, of which the same share is forgotten. Two consecutive displacements differ
    by 2 share times their square; where that is small, errors have one sign and add up.

    Arguments:
        error: expected squared error before.
        rounding: squared rounding error of the stored copy.
        spread: the expectation of `rounding` for values anywhere between those of the storage dtype.
        moved: squared distance from the copy of the last resume.
        share: of the values since then in the average.
    """
    correlation = float(_correlation(np.array([2 * share * moved / spread]))[0]) if spread > 0 else 0.0
    return error + rounding + 2 * correlation * float(np.sqrt(error * rounding))


def _correlation(distance: FloatArray) -> FloatArray:
    """The correlation of two rounding errors, by squared distance in units of their variance."""
    total, weight = np.zeros(distance.shape), 0.0
    for k in range(1, _TERMS + 1):
        total += np.exp(-(np.pi**2) / 6 * k**2 * distance) / k**2
        weight += 1 / k**2
    return total / weight
