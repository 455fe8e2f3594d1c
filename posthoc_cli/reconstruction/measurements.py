"""What a snapshot measures about itself when it is written: how large it is, how exactly it is stored, how far
the network has moved. Reconstruction turns that into variances.

All values are sums over the elements of all averaged tensors (never the copies), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Distance:
    """The squared Euclidean distance between an average and another one of the same run.

    Attributes:
        t, sigma_rel: of the other one; it may have been deleted since.
        squared: the squared distance between this average, as it is exactly, and the other one as it was at hand.
        rounding: the part of `squared` to be expected from rounding: 0 for an exact one of the same time, the squared
            rounding error of its stored copy for an earlier one; of both copies, where both were stored ones.
    """

    t: float
    sigma_rel: float
    squared: float
    rounding: float


@dataclass(frozen=True)
class Measurements:
    """What is known of one stored average.

    Attributes:
        norm: squared norm of the exact average.
        rounding: squared norm of the difference between the stored copy and the exact average.
        distances: to the other profiles of the same time, exact to exact, and to the newest earlier snapshots of
            each profile, exact to stored.
        weights: squared distance between the exact average and the network's weights at its time; None where it is
            not known.
    """

    norm: float
    rounding: float
    distances: tuple[Distance, ...] = ()
    weights: float | None = None
