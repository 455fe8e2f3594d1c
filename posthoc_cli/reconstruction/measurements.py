"""Measurements that a snapshot holds about itself: its norm, rounding error and distances to other averages.

All values are sums over the elements of all averaged tensors (not the copies), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Distance:
    """The squared Euclidean distance between an average and another one of the same run.

    Attributes:
        t, sigma_rel: of the other one; it may have been deleted since.
        squared: between this average, exact, and the other one, exact if of the same time, else as stored.
        rounding: the share of `squared` expected from rounding: the squared rounding errors of the stored copies.
    """

    t: float
    sigma_rel: float
    squared: float
    rounding: float


@dataclass(frozen=True)
class Measurements:
    """The measurements of one stored average.

    Attributes:
        norm: squared norm of the exact average.
        rounding: squared norm of the difference between the stored copy and the exact average.
        distances: to the other profiles of the same time, and to the newest earlier snapshots of each profile.
        weights: squared distance between the exact average and the network's weights at its time; None if unknown.
        arithmetic: expected squared error of the average beyond that of numbers of full precision: float32 has few
            digits near 0, and each update rounds anew.
    """

    norm: float
    rounding: float
    distances: tuple[Distance, ...] = ()
    weights: float | None = None
    arithmetic: float = 0.0
