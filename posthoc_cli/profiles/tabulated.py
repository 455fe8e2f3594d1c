"""A profile from points: any curve that somebody drew or measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles.protocol import FloatArray


@dataclass(frozen=True)
class Tabulated:
    """Density linear between given points and 0 outside them, scaled to a mass of 1.

    The given densities may have any scale: only their ratios count. The tail is the exact integral of the
    density, quadratic between points.

    Attributes:
        times: at least two, growing, 0 or later. Any sequence of numbers will do.
        values: the density at each of them, 0 or above and not all of them 0, in any unit.
    """

    times: Sequence[float]
    values: Sequence[float]

    def __post_init__(self) -> None:
        times, values = (np.asarray(given, dtype=np.float64) for given in (self.times, self.values))
        if times.ndim != 1 or times.shape != values.shape or times.size < 2:
            raise InvalidValueError(
                "profile",
                f"times of shape {times.shape} with densities of shape {values.shape}; must be two lists of "
                "equal length, of two points or more",
            )
        fault = first_fault(times, values)
        if fault is not None:
            index, reason = fault
            raise InvalidValueError("profile", f"point {index + 1}: {reason}")
        object.__setattr__(self, "times", tuple(times.tolist()))
        object.__setattr__(self, "values", tuple(values.tolist()))
        if not (np.any(values > 0) and self._curve[2][0] > 0):
            raise InvalidValueError("profile", "its mass is 0; at least one density must be above 0")

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Mass per unit of time at `s`; 0 outside the first and the last of `times`."""
        knots, relative, later, scale = self._curve
        height = np.interp(np.asarray(s, dtype=np.float64), knots, relative, left=0.0, right=0.0)
        height = np.maximum(height, 0.0)  # on a steep way down to 0, rounding may go below it
        return np.asarray(height / (later[0] * scale), dtype=np.float64)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass after `s`."""
        knots, relative, later, scale = self._curve
        at = np.clip(np.asarray(s, dtype=np.float64), knots[0], knots[-1])
        right = np.clip(np.searchsorted(knots, at, side="right"), 1, len(knots) - 1)
        heights = relative[right] + np.interp(at, knots, relative)
        inside = heights / 2 * ((knots[right] - at) / scale)
        return np.asarray(np.clip((later[right] + inside) / later[0], 0.0, 1.0), dtype=np.float64)

    @cached_property
    def _curve(self) -> tuple[FloatArray, FloatArray, FloatArray, float]:
        """(times, densities relative to the highest, the integral from each time on, the unit of its time).

        Relative to the highest density and to the length of time, so that no given scale overflows. The integral
        is summed from the end, where tails are small and have to keep their digits.
        """
        knots, values = np.array(self.times), np.array(self.values)
        relative = values / values.max()
        scale = float(knots[-1] - knots[0])
        pieces = (relative[1:] / 2 + relative[:-1] / 2) * (np.diff(knots) / scale)
        later = np.append(np.cumsum(pieces[::-1])[::-1], 0.0)
        return knots, relative, later, scale


def first_fault(times: FloatArray, values: FloatArray) -> tuple[int, str] | None:
    """The first point that no profile can have, counted from 0, and what is wrong with it; None if all are fine."""
    after_last = np.diff(times, prepend=-np.inf) > 0
    good = np.isfinite(times) & (times >= 0) & np.isfinite(values) & (values >= 0) & after_last
    if good.all():
        return None
    index = int(np.argmin(good))
    time, value = float(times[index]), float(values[index])
    if not (np.isfinite(time) and time >= 0):
        return index, f"time {time:,.12g}: must be 0 or later, and finite"
    if not (np.isfinite(value) and value >= 0):
        return index, f"density {value:g}: must be 0 or above, and finite"
    return index, f"time {time:,.12g} after {float(times[index - 1]):,.12g}: times must grow"
