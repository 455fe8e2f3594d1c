"""The average that stands for a decay of the learning rate.

The weights are theta(0) plus a sum of updates. An average with the mass tail(s) after s multiplies the update at time s
by tail(s). So an average with tail(s) = d((s - start) / (end - start)) is what a run would give whose rate had been
multiplied by d from `start` on, as far as the updates themselves would have been the same. Of checkpoints theta_j it
is sum_j c_j theta_j whose c_j have the sums w_i = sum_(j >= i) c_j, the multiplier of the updates up to theta_i
(WSM, arXiv 2507.17634, where checkpoints are evenly spaced).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles.others import Tabulated
from posthoc_cli.profiles.tracked import FloatArray

SHAPES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "1-sqrt": lambda x: 1 - np.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}
"""The multiplier d(x) at the fraction x of a decay, from 1 down to 0."""

_STEP = 1e-6
"""Distance of the difference quotient that is the density, as a fraction of the decay."""

_GRID = 4096
_SLACK = 1e-9


@dataclass(frozen=True)
class EmulatedDecay:
    """The average of a run whose rate had fallen from time `start` to `end` (0 <= start < end).

    Attributes:
        start, end: on the run's clock.
        shape: one of `SHAPES`, or points of x in [0, 1] and d(x).
        rate: the run's own rate eta over time, in any unit, where it was not constant; then the multiplier of the
            update at s is eta(start) d(x) / eta(s).
    """

    start: float
    end: float
    shape: str | Tabulated
    rate: Tabulated | None = None

    def __post_init__(self) -> None:
        values = self.tail(np.linspace(self.start, self.end, _GRID, endpoint=False))
        if not (np.isfinite(values).all() and np.all(np.diff(values, prepend=1.0) <= _SLACK)):
            reason = "the multiplier of the rate must start at 1 or below and never grow"
            hint = "the run's own rate falls faster than this decay" if self.rate else ""
            raise InvalidValueError("decay", reason, hint)

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Mass per unit of time at `s`; what is left at the end, where a table ends above 0, is left out."""
        times, width = np.asarray(s, dtype=np.float64), self.end - self.start
        last = self.end - _STEP * width
        a, b = (np.clip(times + sign * _STEP * width, self.start, last) for sign in (-1, 1))
        inside = (times > self.start) & (times <= self.end) & (b > a)
        return np.where(inside, (self.tail(a) - self.tail(b)) / np.where(inside, b - a, 1.0), 0.0)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass after `s`: 1 up to `start`, 0 from `end` on."""
        times = np.asarray(s, dtype=np.float64)
        x = np.clip((times - self.start) / (self.end - self.start), 0.0, 1.0)
        if isinstance(self.shape, Tabulated):
            values = np.interp(x, self.shape.times, self.shape.values)
        else:
            values = SHAPES[self.shape](x)
        if self.rate is not None:
            begin, own = (np.interp(at, self.rate.times, self.rate.values) for at in (self.start, times))
            with np.errstate(divide="ignore", invalid="ignore"):
                values = values * begin / own
        return np.where(times < self.start, 1.0, np.where(times >= self.end, 0.0, values))
