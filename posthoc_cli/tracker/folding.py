"""When the means of updates are folded into the tracked averages, and with which share."""

from __future__ import annotations

import math
from collections.abc import Sequence

WINDOW = 104
LONGEST_OWN = 1 / 8
"""Limits of the updates in a mean, and of the time that a mean of one profile covers, relative to
all of training so far. Longer means round the average less often, but lag further behind a steady
drift (measured after 1,000,000 updates, with 256: noise 9.6e-7, drift 3.1e-6; with 104: 1.3e-6 and
1.4e-6)."""

LONGEST = 1 / 1000
UNEVEN = 1 / 60
"""Limits of the time that a mean that profiles share may cover with more than two values, relative
to all of training so far, and of the relative difference between the profiles in their weights
within it."""


FEWEST_SHARED = 10
"""Fewest updates in a mean that profiles share. Each saves the time of one mean, and a fold takes
that of 8 (scripts/bench_update.py)."""


def _reach(gammas: Sequence[float]) -> float:
    """Compute the time that a mean of more than two values may cover for these profiles, relative
    to `t`."""
    spread = max(gammas) - min(gammas)
    return min(LONGEST, UNEVEN / spread) if spread else LONGEST


def window_ends(
    gammas: Sequence[float],
    window: int,
    begin: float,
    t: float,
    shared: bool,
) -> bool:
    """Return whether the means of the last `window` values, after `begin`, are folded into the
    averages at time `t`.

    The first update is always folded. A mean that profiles share is exact for two values, however
    far they are apart.
    """
    covered = t - begin
    if window >= WINDOW or covered >= LONGEST_OWN * t:
        return True
    if not shared or window <= 1:
        return False
    return covered > _reach(gammas) * t


def may_share_mean(gammas: Sequence[float], window: int, begin: float, t: float) -> bool:
    """Return whether profiles may share a mean of `FEWEST_SHARED` updates, each as long as these
    in (begin, t]."""
    return (t - begin) * FEWEST_SHARED <= _reach(gammas) * t * window


def sketched_window_ends(
    gammas: Sequence[float],
    begin: float,
    before: float,
    t: float,
) -> bool:
    """Return whether, where profiles have their own means, the sketch's window after `begin` ends
    at `t`.

    `before` is the time of the last update. A window is as long as a shared mean; where that would
    contain two values, each value has a window.
    """
    covered = t - begin
    if begin == before:
        covered *= 2
    return covered > _reach(gammas) * t


def new_value_share(gamma: float, t_prev: float, t: float) -> float:
    """Compute 1 - beta, the share of the new value in an update at time `t`; at the first update
    `t_prev` is 0.

    beta = (t_prev / t)**(gamma + 1) with the *true* interval since the last update (equation 127).
    A chain of such updates gives each value the power function's mass on the interval before it.
    """
    if t_prev == 0:
        return 1.0
    passed = (t - t_prev) / t
    if passed == 1:  # beta, below 1e-16, is lost in rounding
        return 1.0
    log_beta = (gamma + 1) * math.log1p(-passed)
    return -math.expm1(log_beta)


def lasting_roundings(
    gammas: Sequence[float],
    gamma: float,
    updates: int,
    smooth: float,
) -> float:
    """Estimate how far an average is from the exact one after `updates` at even times: the root
    mean square, in units of one rounding to nearest.

    Windows of k = L updates values have the relative length L = min(1 / 8, WINDOW / updates), at
    most `_reach` where profiles share a mean, and a fold leaves 1 - m = (1 - L)^(gamma + 1) of
    earlier errors: 1 / (1 - (1 - m)^2) of the squares last. Each adds a rounding of the average
    (dithers cancel out), and m times the error of the mean. Where weights scatter, each of a mean's
    k values is rounded independently: k / 3 squares. Where they move steadily, as a share `smooth`
    of them does, all roundings are alike, and the mean is behind by k times its mean weight up to
    each value, c, at most 1 / 2.

    Measured (3,000 weights that scatter, walk or move steadily, 20 to 100,000 updates, sigma_rel
    0.01 to 0.28): 0.2 to 1.2 of this, for weights that hardly move less.
    """
    length = min(LONGEST_OWN, WINDOW / max(1, updates))
    reach = _reach(gammas)
    if updates * reach >= FEWEST_SHARED:
        length = min(length, reach)
    values = max(0.0, length * updates - 1)  # the first one is copied
    left = (1 - length) ** (gamma + 1)
    mass = 1 - left
    lasting = 1 / (1 - left**2)
    scattered = lasting * (1 + mass**2 * values / 3)
    before = (1 - left * (1 - length)) / ((gamma + 2) * length) - left
    steady = values * before / mass
    return math.sqrt(1 + scattered + smooth * steady**2)
