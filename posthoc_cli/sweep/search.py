"""Where the best length is, from few noisy measurements, and where to measure next. Pure: trials in, numbers out.

A metric is modelled as a quadratic of x, the logarithm of the length scaled to [0, 1], plus a Gaussian process with a
Matern 5/2 kernel for what is not quadratic, plus an offset for each seed, plus noise. (Rasmussen and Williams, Gaussian
Processes for Machine Learning, 2006: sections 2.7 and 4.2.) The hyperparameters are not fitted but averaged over a
grid, each by its likelihood: with seven points many of them explain the data, and one alone would state too narrow a
range. All that is reported is taken over curves drawn from the model.

There is no state but the trials, so that a search goes on from a list of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, cholesky, solve_triangular

from posthoc_cli.profiles import FloatArray

POINTS = 101
"""Of the grid over the range, on which curves are drawn."""

FIRST, NEXT = 6, 2
"""Candidates of the first batch, which are spread evenly, and of each further one."""

CONFIDENCE = 0.95
"""That the best length lies in the stated range."""

_LENGTHS = (0.1, 0.2, 0.4, 0.8)
"""Of the kernel, as a fraction of the range."""
_SIZES = (0.01, 0.1, 0.3, 1.0, 3.0)
"""Standard deviation of what is not quadratic; this and the following relative to the spread of the values."""
_NOISES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8)
"""Standard deviation of the noise, where no standard errors are given."""
_OFFSETS = (0.0, 0.1, 1.0)
"""Standard deviation of what a seed adds to all its trials."""
_TRENDS = (10.0, 1.0, 1.0)
"""Prior standard deviations of the quadratic's coefficients."""
_FAR = 12.0
"""Values so many times further from the upper quartile than this is from the second best say no more than that they are
bad."""
_DRAWS, _MIXED = 1024, 32
_STATED = 1e-3, 1e6
"""Bounds of stated standard errors, relative to the spread of the values."""
_SAME = 0.02
"""Proposals nearer to a measured length than this share of the range repeat it."""


@dataclass(frozen=True)
class Trial:
    """One measurement of a metric.

    Attributes:
        x: the searched parameter, such as sigma_rel; above 0.
        value: of the metric; finite.
        standard_error: of the value, where the evaluation states one.
        seed: trials of one seed share what it adds to all of them.
    """

    x: float
    value: float
    standard_error: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """What trials say about the best value of a searched parameter.

    Attributes:
        best: the estimate of the parameter, not that of the lowest measurement.
        mean, standard_error: the metric there.
        low, high: the range that holds the best with a probability of CONFIDENCE; all of it is equal within the noise.
        regret: how much worse than the true best the metric at `best` is expected to be; not negative.
        noise: standard deviation of one measurement, seeds' offsets aside.
        xs, curve, errors: the metric over the range, with its standard error; shape [POINTS].
        draws: what the curve may be, in a scale of their own, lower is better; shape [draws, POINTS].
    """

    best: float
    mean: float
    standard_error: float
    low: float
    high: float
    regret: float
    noise: float
    xs: FloatArray
    curve: FloatArray
    errors: FloatArray
    draws: FloatArray

    def __repr__(self) -> str:
        where = f"best {self.best:.6g} in {self.low:.6g} to {self.high:.6g}"
        return f"Estimate({where}: {self.mean:.6g} ± {self.standard_error:.2g})"

    @property
    def settled(self) -> bool:
        """Whether more measurements would hardly lead to a better choice."""
        return self.regret <= max(self.noise / 4, 0.005 * float(np.ptp(self.curve)))

    @property
    def edge(self) -> float | None:
        """The end of the range where the best is more likely than not to be, or to lie beyond."""
        places, margin = self.draws.argmin(axis=1), _SAME * (POINTS - 1)
        ends = {float(self.xs[0]): places <= margin, float(self.xs[-1]): places >= POINTS - 1 - margin}
        return next((end for end, there in ends.items() if there.mean() > 0.5), None)


def estimate(
    trials: Sequence[Trial], low: float, high: float, minimize: bool = True, among: Sequence[float] | None = None
) -> Estimate:
    """What three trials or more say about the best parameter in [low, high], or `among` some that are there."""
    sign = 1.0 if minimize else -1.0
    values = sign * np.array([trial.value for trial in trials])
    upper = float(np.quantile(values, 0.75))
    reach = upper - float(np.sort(values)[1])
    values = np.minimum(values, upper + _FAR * reach) if reach > 0 else values
    largest = float(np.abs(values).max()) or 1.0  # whose square may be too large for a number, or too small
    values /= largest
    centre = float(values.mean())
    scale = float(values.std()) if np.ptp(values) > 0 else 1e-9 * (abs(centre) or 1.0)
    places = _place(np.array([trial.x for trial in trials]), low, high)
    errors = np.array([math.nan if t.standard_error is None else t.standard_error / largest / scale for t in trials])
    _, seeds = np.unique([trial.seed for trial in trials], return_inverse=True)
    grid = np.linspace(0, 1, POINTS)
    draws, noise = _draw(places, (values - centre) / scale, errors, seeds.astype(np.intp), grid)
    centre, scale = largest * centre, largest * scale
    curve, spread = centre + scale * draws.mean(axis=0), scale * draws.std(axis=0)
    xs = low * (high / low) ** grid
    choices = xs if among is None else np.array(among)
    points = np.abs(np.log(xs / choices[:, None])).argmin(axis=1)
    place = int(curve[points].argmin())
    best, chosen = int(points[place]), float(choices[place])
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(grid[draws.argmin(axis=1)], [tail, 1 - tail]) + np.array([-0.5, 0.5]) / (POINTS - 1)
    widths = low * (high / low) ** np.clip(ends, 0, 1)
    return Estimate(
        best=chosen,
        mean=sign * float(curve[best]),
        standard_error=float(spread[best]),
        low=min(float(widths[0]), chosen),
        high=max(float(widths[1]), chosen),
        regret=scale * float((draws[:, best] - draws.min(axis=1)).mean()),
        noise=scale * noise,
        xs=xs,
        curve=sign * curve,
        errors=spread,
        draws=draws,
    )


def first_batch(low: float, high: float) -> list[float]:
    """Parameters spread evenly in the logarithm, both ends included."""
    return [float(x) for x in np.geomspace(low, high, FIRST)]


def next_batch(found: Estimate, trials: Sequence[Trial], count: int = NEXT, repeat: bool = False) -> list[float]:
    """Up to `count` parameters to measure next, each of which promises most beside those before.

    That is the largest expected improvement on the lowest of the best and those before, over the drawn curves.
    (Ginsbourger et al., Kriging is well-suited to parallelize optimization, 2010, chosen one after another.)

    With `repeat`, and where the metric differs by less than the noise from end to end of the range, one that is next to
    a measured parameter is that parameter, to be measured with another seed.
    """
    width = math.log(found.xs[-1] / found.xs[0])
    known = np.array(sorted({trial.x for trial in trials}))
    within = found.curve[(found.xs >= found.low) & (found.xs <= found.high)]
    flat = repeat and found.noise > float(np.ptp(within))
    wanted: list[float] = []
    lowest = found.draws[:, np.abs(found.xs - found.best).argmin()]
    for _ in range(count):
        pick = int(np.minimum(found.draws, lowest[:, None]).mean(axis=0).argmin())
        x, lowest = float(found.xs[pick]), np.minimum(lowest, found.draws[:, pick])
        nearest = float(known[np.argmin(np.abs(np.log(known / x)))])
        wanted.append(nearest if flat and abs(math.log(nearest / x)) < _SAME * width else x)
    return list(dict.fromkeys(wanted))


def _place(x: FloatArray, low: float, high: float) -> FloatArray:
    return np.asarray(np.log(x / low) / math.log(high / low))


def _draw(
    places: FloatArray, values: FloatArray, errors: FloatArray, seeds: npt.NDArray[np.intp], grid: FloatArray
) -> tuple[FloatArray, float]:
    """Curves on the grid, [draws, points], from the average over all hyperparameters; and the noise."""
    given = bool(np.isfinite(errors).all())
    same_seed = (seeds[:, None] == seeds[None]).astype(float)
    offsets = _OFFSETS if 1 < len(set(seeds.tolist())) < len(seeds) else _OFFSETS[:1]
    noises = (1.0,) if given else _NOISES
    options = list(itertools.product(_LENGTHS, _SIZES, noises, offsets))
    own = np.clip(errors, *_STATED) if given else np.ones_like(errors)

    both = np.concatenate([places, grid])
    trends = np.vander(2 * both - 1, 3, increasing=True) * _TRENDS
    kernels = {length: _matern(both, length) for length in _LENGTHS}
    count = len(values)

    def covariance(length: float, size: float) -> FloatArray:
        """Of the metric at all places, with the measured ones."""
        return np.asarray(size**2 * kernels[length][:, :count] + trends @ trends[:count].T)

    def factor(length: float, size: float, noise: float, offset: float) -> FloatArray:
        """Of the covariance of the measured values."""
        within = covariance(length, size)[:count] + np.diag((noise * own) ** 2) + offset**2 * same_seed
        return np.asarray(cholesky(within, lower=True, check_finite=False))

    logs = np.empty(len(options))
    for place, option in enumerate(options):  # one at a time: with hundreds of trials all together would take gigabytes
        root = factor(*option)
        whitened = solve_triangular(root, values, lower=True, check_finite=False)
        logs[place] = -0.5 * (whitened**2).sum() - np.log(np.diagonal(root)).sum()
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    random = np.random.default_rng(0)
    # Systematic resampling: each option as often as its weight says, and no more than one off.
    counts = np.bincount(
        np.searchsorted(np.cumsum(weights), (np.arange(_MIXED) + random.random()) / _MIXED).clip(max=len(options) - 1),
        minlength=len(options),
    )  # fmt: skip
    roots = {length: np.linalg.cholesky(kernels[length] + 1e-9 * np.eye(len(both))) for length in _LENGTHS}
    draws = []
    for index in np.flatnonzero(counts):
        length, size, noise, offset = options[index]
        shape = _DRAWS // _MIXED * int(counts[index])
        # A draw before the measurements, moved by what they say to one after them (Matheron's rule).
        curves = size * roots[length] @ random.standard_normal((len(both), shape))
        curves += trends @ random.standard_normal((3, shape))
        chance = noise * own[:, None] * random.standard_normal((count, shape))
        chance += offset * random.standard_normal((count, shape))[seeds]
        missing = values[:, None] - curves[:count] - chance
        moved = covariance(length, size)[count:] @ cho_solve((factor(*options[index]), True), missing)
        draws.append((curves[count:] + moved).T)
    levels = np.array([noise for _, _, noise, _ in options])
    return np.concatenate(draws), float(np.sqrt((own**2).mean()) * (weights * levels).sum())


def _matern(x: FloatArray, length: float) -> FloatArray:
    distance = math.sqrt(5) * np.abs(x[:, None] - x[None]) / length
    return np.asarray((1 + distance + distance**2 / 3) * np.exp(-distance))
