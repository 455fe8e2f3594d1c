"""Errors of stored copies that are rounded to the nearest: how far those of two snapshots are alike.

An element that moves by several spacings of the storage dtype between two snapshots is rounded anew, and its two
errors have nothing to do with each other. One that hardly moves is rounded to the same value: then a combination of
both snapshots does not average the error away. Errors are uniform within a spacing h, of variance r = h^2 / 12, and
periodic in the value with period h. By the Fourier series of that sawtooth, after a Gaussian displacement of variance
d their correlation is

    rho = 6 / pi^2 sum_k k^-2 exp(-2 pi^2 k^2 d / h^2) = 6 / pi^2 sum_k k^-2 exp(-pi^2 / 6 k^2 d / r).

With the sums over all elements in the place of d and r it is that of a network whose elements move alike, measured in
their spacings. As a function of expected squared distances it is a mixture of Gaussian kernels, hence positive
semidefinite.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy import linalg

from posthoc_cli.profiles import FloatArray

_TERMS = 64
_FAR = 12.0
"""Squared distance, in roundings, beyond which nothing is left of the correlation: exp(-pi^2 / 6 * 12) = 3e-9."""


_MOST = 0.99
"""Correlation of copies between which nothing moves. Were it 1, coefficients of opposite signs could cancel errors
whose sizes differ a little, and nothing would bound them."""


def rounding_factor(rounding: FloatArray, arithmetic: FloatArray, apart: FloatArray) -> FloatArray:
    """A matrix B with B^T B = the covariance of the stored copies' errors: shape [n, n].

    Arguments:
        rounding: variance of each copy's rounding: shape [n].
        arithmetic: variance of what else is wrong with each, independently: shape [n].
        apart: expected squared distances of the averages: shape [n, n].
    """
    root = np.sqrt(rounding)
    scale = root[:, None] * root
    with np.errstate(over="ignore"):  # of absurdly large ones, which are far below their limit then
        limit = _FAR * scale
    near = (apart < limit) & ~np.eye(root.size, dtype=bool)
    if not near.any():
        return np.diag(np.sqrt(rounding + arithmetic))
    correlation = np.eye(root.size)
    correlation[near] = _MOST * _correlation(apart[near] / scale[near])
    # Divide and conquer: the default driver fails on one in some hundred of these, whose eigenvalues cluster.
    values, vectors = linalg.eigh(correlation * scale + np.diag(arithmetic), driver="evd")
    return np.asarray(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T, dtype=np.float64)


def inherited_factor(inherited: FloatArray, gamma: FloatArray, times: FloatArray) -> FloatArray:
    """A matrix B with B^T B = the covariance of what averages inherited from rounded snapshots: shape [n, n].

    Of one profile, an average has the error of an earlier one as far as it has its values, (t_i / t)^(gamma + 1), and
    what it has beyond that came in between.

    Arguments:
        inherited: variance of each one's error: shape [n].
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
    """Expected squared error of an average that goes on from its stored copy, after it had an error before.

    A copy lies on the values of the storage dtype: what the next rounding takes depends on the displacement from there
    alone. The displacement is `share` times what the average lags behind, a lag that is forgotten by that share in the
    same time; two in a row differ by 2 share times their square. Where that is little, all errors are of one sign, and
    add up.

    Arguments:
        error: expected squared error that it had already.
        rounding: squared rounding error of the stored copy.
        spread: what that is to be expected of values that lie anywhere between those of the storage dtype.
        moved: squared distance from the copy that it went on from the last time.
        share: of the average, what came in since then.
    """
    alike = float(_correlation(np.array([2 * share * moved / spread]))[0]) if spread > 0 else 0.0
    return error + rounding + 2 * alike * float(np.sqrt(error * rounding))


def _correlation(distance: FloatArray) -> FloatArray:
    """Of two errors, by squared distance in units of their variance."""
    total, weight = np.zeros(distance.shape), 0.0
    for k in range(1, _TERMS + 1):
        total += np.exp(-(np.pi**2) / 6 * k**2 * distance) / k**2
        weight += 1 / k**2
    return total / weight
