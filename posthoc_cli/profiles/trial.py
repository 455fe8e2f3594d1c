"""Trying a profile that somebody else wrote, before anything is built on it."""

from __future__ import annotations

import numpy as np

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles.protocol import FloatArray, Profile

_SLACK = 1e-9
"""How far rounding may take a tail from where it belongs."""


def try_profile(profile: Profile, t: float, title: str) -> None:
    """Look at a profile at some 1,200 times from before the run to after `t`, the denser the nearer to 0 and to `t`.

    Both functions must take arrays and return finite values in their shape; the density must not be below 0; the
    tail must lie in [0, 1], be 1 before 0 and 0 from `t` on, and never grow. It may fall at once at 0: that is mass
    on the start. Whether the density is the tail's slope is not looked at.

    Raises:
        InvalidValueError: what is wrong, after `title`.
    """
    inside = _times_inside(t)
    density = _values(profile, "density", inside, title)
    if np.any(density < 0):
        lowest = density.argmin()
        raise _bad(title, f"density is {density[lowest]:.6g} at s = {inside[lowest]:,.12g}; must not be below 0")
    times = np.concatenate(([-t, -1e-6 * t, 0.0], inside, [1.5 * t]))
    _check_tail(times, _values(profile, "tail", times, title), t, title)


def _check_tail(times: FloatArray, tail: FloatArray, t: float, title: str) -> None:
    outside = np.maximum(tail - 1, -tail)
    if outside.max() > _SLACK:
        worst = outside.argmax()
        raise _bad(
            title, f"tail is {tail[worst]:.6g} at s = {times[worst]:,.12g}; must lie in [0, 1], and be 1 before 0"
        )
    before, after = 1 - tail[times < 0].min(), tail[times >= t].max()
    for mass, where in ((before, "before 0"), (after, f"after t = {t:,.12g}")):
        if mass > _SLACK:
            raise _bad(title, f"{mass:.6g} of its mass lies {where}; must lie within the run, (0, t]")
    growth = np.diff(tail)
    if growth.max() > _SLACK:
        raise _bad(title, f"tail grows after s = {times[growth.argmax()]:,.12g}; the mass after s must never grow")


def _times_inside(t: float) -> FloatArray:
    """Times in (0, t]: evenly spread, and approaching both ends."""
    near = np.geomspace(1e-9, 1e-3, 61)
    relative = np.unique(np.concatenate((np.arange(1, 1025) / 1024, near, 1 - near)))
    return np.asarray(relative * t, dtype=np.float64)


def _values(profile: Profile, name: str, times: FloatArray, title: str) -> FloatArray:
    """What one of the functions makes of times, finite and in their shape."""
    try:
        result = np.asarray(getattr(profile, name)(times), dtype=np.float64)
    except (TypeError, ValueError, ArithmeticError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _bad(title, f"{name} fails for an array of times: {reason}; must take any shape") from error
    if result.shape != times.shape:
        raise _bad(title, f"{name} of times of shape {times.shape} has shape {result.shape}; must have the same")
    if not np.all(np.isfinite(result)):
        worst = np.argmin(np.isfinite(result))
        raise _bad(title, f"{name} is {result[worst]} at s = {times[worst]:,.12g}; must be finite")
    return result


def _bad(title: str, reason: str) -> InvalidValueError:
    return InvalidValueError(title, reason)
