"""Curves of a metric against the length of an average, drawn from a model of few noisy
measurements.

A metric is modelled as a quadratic of x, the logarithm of the length scaled to [0, 1], plus a
Gaussian process with a Matern 5/2 kernel for the deviation from it, plus an offset for each seed,
plus noise. (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006: sections 2.7 and
4.2.) The hyperparameters are not fitted but averaged over a grid, weighted by their likelihood:
with seven points many of them explain the data, and a single choice would state too narrow a range.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.special import softmax

from posthoc_cli.profiles import FloatArray

POINTS = 101  # the number of points of the grid over the range, on which curves are drawn
GRID = np.linspace(0, 1, POINTS)

_LENGTHS = (0.1, 0.2, 0.4, 0.8)  # length scales of the kernel, as a fraction of the range
_SIZES = (0.01, 0.1, 0.3, 1.0, 3.0)
"""Standard deviations of the deviation from a quadratic; as the following, relative to the spread
of the values."""
_NOISES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8)
"""Standard deviations of the noise; of stated standard errors those below, as trials on the same
data have most of such an error in common: with the errors as noise, choices were up to 27 times as
far from the best."""
_OFFSETS = (0.0, 0.1, 1.0)  # standard deviations of the offset that a seed adds to all its trials
_TRENDS = (10.0, 1.0, 1.0)  # prior standard deviations of the coefficients of the quadratic
_ROUNDING = 1e-9  # added to the variances, so that rounding leaves a covariance positive definite
_FAR = 12.0
"""The largest distance of a value above the upper quartile, in distances of that from the second
best value. Larger values are clipped: they only show that a length is bad."""
_DRAWS = 1024
_STATED = 1e-3, 1e6  # bounds of stated standard errors, relative to the spread of the values


def draw_curves(
    places: FloatArray,
    values: FloatArray,
    errors: FloatArray,
    seeds: FloatArray,
) -> tuple[FloatArray, float]:
    """Return curves on GRID drawn from the mixture over all hyperparameters, [draws, POINTS], and
    the standard deviation of a measurement, without the offset of its seed.

    The measurements have places in [0, 1], values, of which lower is better, stated standard errors
    or nan, and seeds.
    """
    values = clipped(values)
    centre = values.mean()
    scale = values.std()
    standard = (values - centre) / scale
    chances = _chances(errors / scale, seeds)
    both = np.concatenate([places, GRID])
    noises = []
    posteriors = []
    for length, size in itertools.product(_LENGTHS, _SIZES):
        prior = _prior(both, length, size)
        for noise, chance in chances:
            noises.append(noise)
            posteriors.append(_posterior(prior, chance, standard))
    weights = softmax([posterior.likelihood for posterior in posteriors])
    curves = centre + scale * _drawn(posteriors, weights)
    return curves, float(scale * (weights @ noises))


def _drawn(posteriors: Sequence[_Posterior], weights: FloatArray) -> FloatArray:
    """Return curves drawn from the weighted mixture of posteriors, shape [draws, POINTS]."""
    random = np.random.default_rng(0)
    counts = random.multinomial(_DRAWS, weights)
    draws = []
    for posterior, count in zip(posteriors, counts, strict=True):
        if count == 0:
            continue
        _, mean, covariance = posterior
        draws.append(random.multivariate_normal(mean, covariance, count, method="cholesky"))
    return np.concatenate(draws)


def clipped(values: FloatArray) -> FloatArray:
    """Return values, of which lower is better, with those far above most lowered."""
    upper = float(np.quantile(values, 0.75))
    _, second, *_ = np.sort(values).tolist()
    reach = upper - second
    if reach <= 0:
        return values
    highest = upper + _FAR * reach
    return np.asarray(np.minimum(values, highest))


def _chances(
    errors: FloatArray,
    seeds: FloatArray,
) -> list[tuple[float, FloatArray]]:
    """Return the choices of what chance adds to the values: the noise, and the covariance."""
    noises = list(_NOISES)
    scales = np.ones_like(errors)
    if np.isfinite(errors).all():
        stated = np.clip(errors, *_STATED)
        usual = float(np.median(stated))
        scales = stated / usual
        noises = sorted({min(noise, usual) for noise in _NOISES})
    offsets: tuple[float, ...] = _OFFSETS
    if np.ptp(seeds) == 0:
        offsets = _OFFSETS[:1]  # that of a single seed is in the trend
    shared = np.equal.outer(seeds, seeds)
    chances = []
    for noise, offset in itertools.product(noises, offsets):
        variances = (noise * scales) ** 2
        covariance = np.diag(variances) + offset**2 * shared
        chances.append((noise, covariance))
    return chances


def _prior(x: FloatArray, length: float, size: float) -> FloatArray:
    """Return the covariance of the metric at all pairs of places before the measurements."""
    powers = np.vander(2 * x - 1, 3, increasing=True)
    trends = powers * _TRENDS
    trend = trends @ trends.T
    apart = np.abs(x[:, None] - x)
    distance = math.sqrt(5) * apart / length
    matern = (1 + distance + distance**2 / 3) * np.exp(-distance)
    rounding = _ROUNDING * np.eye(len(x))
    return np.asarray(trend + size**2 * matern + rounding)


class _Posterior(NamedTuple):
    """The metric on GRID after the measurements."""

    likelihood: float  # its logarithm, but for a constant
    mean: FloatArray
    covariance: FloatArray


def _posterior(prior: FloatArray, chance: FloatArray, values: FloatArray) -> _Posterior:
    """Return the posterior for the covariances before and of the measurements (Rasmussen and
    Williams, algorithm 2.1)."""
    count = len(values)
    measured = prior[:count, :count] + chance
    across = prior[:count, count:]
    root = cholesky(measured, lower=True, check_finite=False)
    sides = np.column_stack([values, across])
    solved = solve_triangular(root, sides, lower=True, check_finite=False)
    fit = solved[:, 0]
    known = solved[:, 1:]
    volume = np.log(root.diagonal()).sum()
    likelihood = float(-0.5 * fit @ fit - volume)
    covariance = prior[count:, count:] - known.T @ known
    return _Posterior(likelihood, fit @ known, covariance)
