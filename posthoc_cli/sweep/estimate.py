"""The estimate of a metric at each length from noisy measurements of some of them.

Lengths are compared by their place, the logarithm of sigma_rel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from posthoc_cli.profiles import FloatArray
from posthoc_cli.sweep.trial import FRESH, Spot, Trial

WINDOW = 2.5
"""Distance to which lengths count in the quadratic at one of them, in steps of the grid. From 2.1
to 4 it hardly matters: 91 to 94 % (both from scripts/bench_sweep.py)."""
_WIDE = 0.75
_SAME = 0.1
"""Distances in steps of the grid: between lengths with a gap to measure in, and below which two are
the same."""
UNTUNED = 0.05  # the sigma_rel to take without a search, see the guide `gain`
_FAR = 12.0
"""The largest distance of a metric above the upper quartile, in distances of the quartile from the
second best metric. Larger ones are lowered: they only show that a length is bad."""


class Measured(NamedTuple):
    """The successful trials of lengths that end with the run, shape [points]."""

    points: FloatArray
    means: FloatArray
    counts: FloatArray
    # sum of the squared deviations of repeated measurements from their mean
    scatter: float
    # the median standard error that trials state; nan if one states none
    stated: float


def gather(trials: Iterable[Trial]) -> Measured:
    """Combine the successful trials of each length, without what only claims are made from."""
    values: dict[float, list[float]] = {}
    stated = []
    for trial in trials:
        is_length = trial.spot is not None and trial.spot == Spot(trial.spot.sigma_rel)
        if is_length and trial.seed not in FRESH and trial.value is not None:
            values.setdefault(trial.sigma_rel or 0.0, []).append(trial.value)
            stated.append(trial.standard_error or math.nan)
    points = sorted(values)
    scatter = 0.0
    for measured in values.values():
        scatter += float(np.var(measured)) * len(measured)
    return Measured(
        np.array(points),
        np.array([np.mean(values[point]) for point in points]),
        np.array([float(len(values[point])) for point in points]),
        scatter,
        float(np.median(stated)) if stated else math.nan,
    )


@dataclass(frozen=True)
class Estimate:
    """The metric of each measured length, where near ones and repetitions are averaged.

    Attributes:
        points: the measured lengths, in ascending order.
        means: the estimated metrics; as measured if the metric has no noise.
        errors: their standard errors; nan if the noise is unknown.
        noise: the standard deviation of one measurement; 0 if a repetition had the same metric;
            nan if too few measurements show it.
        best: the length with the best estimate.
        tied: the first and the last of the lengths around it that are not significantly worse; None
            if the noise is unknown, or if it is 0 and the next lengths are worse.
        shown: which lengths are not so bad that their metrics were lowered.
        vertex: the place where the quadratic at the best length is lowest, at most a step away.
        value: the estimated metric of the best length.
        measured: its measured one.
        freedom: the degrees of freedom of the noise; infinite if only trials state it.
        stated: the standard error that trials state; nan if one states none.
    """

    points: FloatArray
    means: FloatArray
    errors: FloatArray
    noise: float
    best: float
    tied: tuple[float, float] | None
    shown: FloatArray
    vertex: float
    value: float
    measured: float
    freedom: float
    stated: float


def estimate(trials: Iterable[Trial], step: float, minimize: bool) -> Estimate:
    """Estimate the metric at each measured length, `step` apart in the grid, from a quadratic at
    each, with the weights of Cleveland (1979) to WINDOW steps.

    The noise follows from residuals and repetitions. Of lengths that are equally good the nearest
    to UNTUNED is the best. The estimates are linear in the measurements, so that their standard
    errors follow from the noise.
    """
    measured = gather(trials)
    sign = 1.0 if minimize else -1.0
    values = lower_far_values(sign * measured.means)
    places = np.log(measured.points)
    fits = fit_quadratics(places, measured.counts, WINDOW * step)
    smoother = fits[0]
    is_exact = measured.counts.max() > 1 and measured.scatter == 0
    if is_exact or values.min() == values.max():  # else sums would round equal ones differently
        smoother = np.eye(len(places))
    smooth = smoother @ values
    noise = 0.0
    freedom = math.inf
    if not is_exact:
        noise, freedom = estimate_noise(measured, smoother, values - smooth)
    distances = np.where(smooth == smooth.min(), abs(places - math.log(UNTUNED)), math.inf)
    best = int(distances.argmin())
    differences = smoother - smoother[best]
    means = sign * smooth
    return Estimate(
        measured.points,
        means,
        noise * spread(smoother, measured.counts),
        noise,
        float(measured.points[best]),
        tied_range(measured.points, smooth, best, noise * spread(differences, measured.counts)),
        values == sign * measured.means,
        places[best] + vertex_offset(fits[:, best] @ values, step),
        float(means[best]),
        float(measured.means[best]),
        freedom,
        measured.stated,
    )


def fit_quadratics(places: FloatArray, counts: FloatArray, window: float) -> FloatArray:
    """Fit what gives value, slope and curvature of the local quadratic at each place, from all
    values: shape [3, places, values]."""
    fits = []
    for place in places:
        offsets = places - place
        distances = np.minimum(abs(offsets) / window, 1.0)
        roots = np.sqrt(counts * (1 - distances**3) ** 3)
        powers = np.vander(offsets, 3, increasing=True)
        fits.append(np.linalg.pinv(roots[:, None] * powers) * roots)
    return np.stack(fits, axis=1)


def vertex_offset(coefficients: FloatArray, step: float) -> float:
    """Find the offset at which a quadratic is lowest, at most a step."""
    _, slope, curvature = coefficients.tolist()
    if curvature <= 0:
        return -math.copysign(step, slope)
    return float(min(max(-slope / (2 * curvature), -step), step))


def spread(rows: FloatArray, counts: FloatArray) -> FloatArray:
    """Compute the standard deviation of sums of means of so many measurements with a noise of 1."""
    return np.asarray(np.sqrt((rows**2 / counts).sum(axis=1)))


def estimate_noise(
    measured: Measured,
    smoother: FloatArray,
    residuals: FloatArray,
) -> tuple[float, float]:
    """Estimate the standard deviation of a measurement, at most what trials state, and its degrees
    of freedom; nan if there are too few."""
    counts = measured.counts
    # the expectation of the sum below for a noise of 1
    freedom = counts @ spread(np.eye(len(counts)) - smoother, counts) ** 2
    freedom += (counts - 1).sum()
    if freedom < 1:
        return measured.stated, math.inf
    squares = counts @ residuals**2 + measured.scatter
    noise = np.fmin(math.sqrt(squares / freedom), measured.stated)
    return float(noise), float(freedom)


def tied_range(
    points: FloatArray,
    smooth: FloatArray,
    best: int,
    errors: FloatArray,
) -> tuple[float, float] | None:
    """Find the first and the last of the points around the best one whose difference from it is
    within two standard errors of the difference; None without errors if only the best one is."""
    if np.isnan(errors).any():
        return None
    is_worse = smooth - smooth[best] > 2 * errors
    worse = np.flatnonzero(is_worse)
    first = worse[worse < best].max(initial=-1) + 1
    last = worse[worse > best].min(initial=len(smooth)) - 1
    if first == last and not errors.any():
        return None
    return float(points[first]), float(points[last])


def lower_far_values(values: FloatArray) -> FloatArray:
    """Lower the values that are far above most, where lower is better."""
    if len(values) < 4:
        return values
    upper = float(np.quantile(values, 0.75))
    reach = upper - np.sort(values)[1]
    if reach <= 0:
        return values
    return np.asarray(np.minimum(values, upper + _FAR * reach))


def is_in_gap(found: Estimate, step: float) -> bool:
    """Return whether the vertex lies between lengths that are about a step apart, and near
    neither."""
    offsets = np.log(found.points) - found.vertex
    below = -offsets[offsets <= 0].max(initial=-math.inf)
    above = offsets[offsets > 0].min(initial=math.inf)
    return bool(min(below, above) > _SAME * step and below + above > _WIDE * step)
